"""What a merged model is measured on beside its adapter: held-out samples of the run, or made-up prompts without
them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.data import Dropped, Encoded, OpenedData, Sample, encode_within, open_data
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.data.sample import UNNAMED_TASK, text_message
from flamingo_ft.errors import UserError
from flamingo_ft.inference.answer import answer_batch
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .questions import Question, questions_of

HELD_OUT = "held-out samples of the run"
MADE_UP = "made-up prompts (the run's samples were not found; the adapter's answers stand in for right ones)"
ANSWERS = 32  # generating costs more than the loss
INSTEAD = "A bird on a branch, to the left."  # of an adapter's empty answer, on which no loss may be defined
PICTURES, NEW_TOKENS = 3, 16  # made-up prompts with a picture; longest answer to them


@dataclass(frozen=True)
class Probe:
    """encoded: samples for the loss; questions: for the accuracy; origin: where they come from, in words."""

    encoded: Sequence[tuple[Sample, Encoded]]
    questions: Sequence[Question]
    origin: str
    batch_size: int = 8
    max_new_tokens: int = NEW_TOKENS

    @property
    def made_up(self) -> bool:
        """Whether there are no right answers, only the adapter's."""
        return self.origin == MADE_UP


def probe_of_run(folder: Path, processor: FlamingoProcessor, context: int, samples: int) -> Probe | None:
    """Return at most ``samples`` samples of the run in ``folder``, held out or else trained on; None where its recipe
    or its data is not here, or nothing in it has an answer within ``context`` tokens."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    try:
        recipe = load_recipe(folder / RECIPE_FILE, require=("data",))
        data = open_data(recipe.data, recipe.train.seed)
        found = _spread(data, samples)
        encoded = _encoded(found, processor, recipe, context)
    except UserError:
        return None
    if not encoded:
        return None
    questions = [q for q in questions_of(found) if len(encode_prompt(processor, q.messages)) < context]
    origin = HELD_OUT if data.eval else "samples that the run was trained on (it holds none out)"
    questions = questions[: min(samples, ANSWERS)]
    return Probe(encoded, questions, origin, recipe.eval.batch_size, recipe.eval.max_new_tokens)


def made_up_probe(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> Probe:
    """Return questions about pictures of noise, and one without a picture, with what ``model``, the adapter's,
    answers."""
    dice = np.random.default_rng(0)
    about = [{"type": "image"}, {"type": "text", "text": "What is in this picture, and where?"}]
    asked = [([{"role": "user", "content": about}], [_noise(dice)]) for _ in range(PICTURES)]
    asked.append(([text_message("user", "Name three colours.")], []))
    rows = [{"messages": messages, "images": images, "where": "made up"} for messages, images in asked]
    answers = answer_batch(model, processor, rows, NEW_TOKENS)
    samples = [
        Sample([*messages, text_message("assistant", answer or INSTEAD)], images, UNNAMED_TASK, "made up")
        for (messages, images), answer in zip(asked, answers, strict=True)
    ]
    encoded = [(sample, encode_within(processor, sample, context_length(model.config))) for sample in samples]
    return Probe(encoded, questions_of(samples), MADE_UP)


def _spread(data: OpenedData, samples: int) -> list[Sample]:
    """Samples of every source that is held out, or of every source where none is; their images can be read."""
    held_out = data.eval or data.train
    found = replace(data, eval=held_out).eval_samples(-(-samples // len(held_out)))
    return found[:samples]


def _encoded(
    samples: Sequence[Sample], processor: FlamingoProcessor, recipe: Recipe, context: int
) -> list[tuple[Sample, Encoded]]:
    """Samples as the run learns from them, but those that it drops."""
    limit = min(recipe.data.max_text_tokens or context, context)
    both = [(sample, encode_within(processor, sample, limit, recipe.data.too_long)) for sample in samples]
    return [(sample, encoded) for sample, encoded in both if not isinstance(encoded, Dropped)]


def _noise(dice: np.random.Generator) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(dice.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
