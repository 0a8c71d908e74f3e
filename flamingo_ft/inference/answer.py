"""Asking a model: prompts with images in, words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flamingo_ft.adapters import load_adapter
from flamingo_ft.data.collate import load_pixels, open_image, pad_ids
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.data.samples import MEDIA_MARKER
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor


def answer(adapter: str | Path, images: Sequence[Path], prompt: str, max_new_tokens: int = 64) -> str:
    """What the adapter's model says to one prompt. ``<image>`` in the prompt marks where each image belongs; without
    any, the images stand before it. Raises UserError when images and markers do not match."""
    content = place_images(prompt, len(images))
    for path in images:
        open_image(path)  # a bad path is told before the model is loaded
    model, processor = load_adapter(adapter)
    question = {"messages": [{"role": "user", "content": content}], "images": list(map(str, images)), "where": "prompt"}
    return answer_batch(model, processor, [question], max_new_tokens)[0]


def place_images(prompt: str, images: int) -> list[dict[str, str]]:
    """The prompt as typed blocks."""
    markers = prompt.count(MEDIA_MARKER)
    if markers == 0:
        return [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    if markers != images:
        raise UserError(
            f"--prompt has {markers} {MEDIA_MARKER} markers but {images} images were given; "
            "give one --image for each marker"
        )
    first, *rest = prompt.split(MEDIA_MARKER)
    blocks = [{"type": "text", "text": first}]
    for text in rest:
        blocks += [{"type": "image"}, {"type": "text", "text": text}]
    return blocks


@torch.no_grad()
def answer_batch(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    questions: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to dialogues that end where the assistant is to speak; each with ``messages`` and ``images``."""
    prompts = [encode_prompt(processor, question["messages"]) for question in questions]
    batch = pad_ids(prompts, processor.tokenizer.pad_token_id, "left") | load_pixels(processor, questions)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    out = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
    )
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
