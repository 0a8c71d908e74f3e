"""Asking a model: prompts with images in, words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from flamingo_ft.adapters import load_trained
from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.data.collate import load_media, pad_ids
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.data.media import open_image
from flamingo_ft.data.schemas.build_sample import text_to_blocks
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.added_tokens import MEDIA_TOKEN


def answer(adapter: str | Path, images: Sequence[Path], prompt: str, max_new_tokens: int = 64) -> str:
    """What the adapter's model says to one prompt.

    ``<image>`` in the prompt marks where each image belongs; without any, the images stand before it. Raises
    UserError when images and markers do not match, and for an image that cannot be read.
    """
    content = place_images(prompt, len(images))
    for path in images:
        open_image(path)  # a bad path is told before the model is loaded
    model, processor = load_trained(adapter)
    messages = [{"role": "user", "content": content}]
    question = {"messages": messages, "images": list(images), "where": "prompt"}
    return answer_batch(model, processor, [question], max_new_tokens)[0]


def place_images(prompt: str, images: int) -> list[dict[str, str]]:
    """The prompt as typed blocks."""
    markers = prompt.count(MEDIA_TOKEN)
    if markers == 0:
        return [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    if markers != images:
        raise UserError(
            f"--prompt has {markers} {MEDIA_TOKEN} markers but {images} images were given; "
            "give one --image for each marker"
        )
    return text_to_blocks(prompt)


@torch.no_grad()
def answer_batch(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    questions: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to dialogues that end where the assistant is to speak, as long as the context has room for.

    Each question has ``messages``, ``images`` and ``where``. Raises UserError for a prompt that fills the context.
    """
    tokenizer = processor.tokenizer
    prompts = encode_prompts(model, processor, questions)
    batch = pad_ids(prompts, tokenizer.pad_token_id, "left") | load_media(processor, questions)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    ends = end_token_ids(model, processor)
    options = {"eos_token_id": ends or None, "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    room = min(max_new_tokens, context_length(model.config) - max(map(len, prompts)))
    out = model.generate(**batch, max_new_tokens=room, **options)
    new = out[:, batch["input_ids"].shape[1] :].tolist()
    answers = [list(takewhile(lambda token: token not in ends, row)) for row in new]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def encode_prompts(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    questions: Sequence[Mapping[str, Any]],
) -> list[list[int]]:
    """The token ids of each question. UserError, naming its ``where``, for one without room for an answer."""
    limit, prompts = context_length(model.config), []
    for question in questions:
        prompts.append(encode_prompt(processor, question["messages"]))
        if len(prompts[-1]) >= limit:
            found = f"found {len(prompts[-1])} text tokens to answer, the language model's context is {limit}"
            raise UserError(f"{question['where']}: {found}; shorten the prompt")
    return prompts
