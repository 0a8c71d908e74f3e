"""Do two models say the same? Logits and most likely tokens, over real dialogues where there are any."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flamingo_ft.config import RECIPE_FILE, load_recipe
from flamingo_ft.data import Sample, open_data
from flamingo_ft.data.collate import load_media
from flamingo_ft.data.encode import encode, text_message
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

PROMPTS = 8


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart on the same tokens.

    max_logit_difference: largest absolute difference; relative: the same over the largest absolute logit;
    token_agreement: share of positions, 0..1, where both find the same token most likely; tokens: positions compared,
    prompts: in how many dialogues.
    """

    max_logit_difference: float
    relative: float
    token_agreement: float
    tokens: int
    prompts: int


def sample_prompts(processor: FlamingoProcessor, folder: Path) -> tuple[list[dict[str, Tensor]], str]:
    """Inputs for a model, and where they come from: dialogues of the run in ``folder``, else made-up ones."""
    samples = _samples_of(folder)
    if not samples:
        return _made_up(processor), "made up: the run's own samples were not found"
    prompts = [_inputs(processor, sample.messages, load_media(processor, [vars(sample)])) for sample in samples]
    return prompts, "the run's own samples"


@torch.no_grad()
def logits_on(model: FlamingoForConditionalGeneration, prompts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The model's logits (T, vocabulary) for each prompt, in float32 in the computer's memory."""
    model.eval()
    on_device = ({name: tensor.to(model.device) for name, tensor in prompt.items()} for prompt in prompts)
    return [model(**prompt, use_cache=False).logits[0].float().cpu() for prompt in on_device]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """How far logits are from those they should be."""
    prompts, found, expected = len(expected), torch.cat(list(found)), torch.cat(list(expected))
    largest = float((found - expected).abs().max())
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return Difference(
        max_logit_difference=largest,
        relative=largest / float(expected.abs().max()),
        token_agreement=float(agreement),
        tokens=len(expected),
        prompts=prompts,
    )


def _samples_of(folder: Path) -> list[Sample]:
    """The first samples of the run's data; none where its recipe or its files are gone."""
    if not (folder / RECIPE_FILE).is_file():
        return []
    try:
        recipe = load_recipe(folder / RECIPE_FILE, require=("data",))
        data = open_data(recipe.data, recipe.train.seed)
        return list(itertools.islice(data.samples(data.held_out or data.train), PROMPTS))
    except UserError:
        return []


def _made_up(processor: FlamingoProcessor) -> list[dict[str, Tensor]]:
    """Questions about pictures of noise, and one without a picture."""
    dice = torch.Generator().manual_seed(0)
    shape = processor.pixel_values([[Image.new("RGB", (8, 8))]]).shape
    question = [{"type": "image"}, {"type": "text", "text": "What is in this picture, and where?"}]
    shown = [{"role": "user", "content": question}, text_message("assistant", "A bird on a branch, to the left.")]
    told = [text_message("user", "Name three colours."), text_message("assistant", "Red, green and blue.")]
    pictures = [{"pixel_values": torch.randn(shape, generator=dice)} for _ in range(PROMPTS - 1)]
    return [*(_inputs(processor, shown, picture) for picture in pictures), _inputs(processor, told, {})]


def _inputs(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]], pixels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    ids = encode(processor, messages).input_ids
    return {"input_ids": torch.tensor([ids]), **pixels}
