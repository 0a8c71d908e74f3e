"""Pairs of a better and a worse answer, as TRL's DPOTrainer takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import is_image

from .media import open_medium
from .sample import Sample, Video

Messages = Sequence[Mapping[str, Any]]


def preference_row(sample: Sample) -> dict[str, Any]:
    """``prompt``, ``chosen`` and ``rejected`` messages, and the ``images``, opened.

    The prompt goes up to the last message that is not the assistant's. Raises UserError, naming file and row, where the
    sample is no pair, its answers hold images, it holds videos, or an image cannot be read.
    """
    parts = prompt_and_answers(sample)
    if any(isinstance(medium, Video) for medium in sample.images):
        raise UserError(f"{sample.where}: images: found a video; TRL's preference data has images alone")
    images = [open_medium(medium, sample.where)[0] for medium in sample.images]
    names = ("prompt", "chosen", "rejected")
    return {name: _plain(messages) for name, messages in zip(names, parts, strict=True)} | {"images": images}


def prompt_and_answers(sample: Sample) -> tuple[Messages, Messages, Messages]:
    """The messages up to the last that is not the assistant's, the better answer and the worse one.

    Raises UserError, naming file and row, where the sample is no pair or its answers hold images.
    """
    if not sample.rejected:
        raise UserError(f"{sample.where}: rejected: found none, wanted a worse answer to compare with")
    asked = answer_begins(sample.messages)
    answers = sample.messages[asked:], sample.rejected
    for name, messages in zip(("chosen", "rejected"), answers, strict=True):
        _check_answer(messages, f"{sample.where}: {name}")
    return sample.messages[:asked], *answers


def answer_begins(messages: Messages) -> int:
    """Index of the first message after the last that is not the assistant's."""
    return 1 + max((i for i, message in enumerate(messages) if message["role"] != "assistant"), default=-1)


def _check_answer(messages: Messages, where: str) -> None:
    if not messages or any(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: found no answer of the assistant's, wanted one at the end")
    if any(is_image(block) for message in messages for block in message["content"]):
        raise UserError(f"{where}: found an image in the answer; preference training takes text alone there")


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Role and content alone: TRL's datasets want the same fields in every message."""
    return [{"role": message["role"], "content": list(message["content"])} for message in messages]
