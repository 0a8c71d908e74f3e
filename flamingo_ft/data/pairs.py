"""Preference pairs, a prompt with a better and a worse answer: as token ids, and as TRL's trainer takes them.

Shapes: P pairs, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, is_image

from .collate import collate_text
from .encode import IGNORED, Cut, Dropped, Encoded, TooLong, encode_within
from .media import open_medium
from .sample import Sample, Video

Messages = Sequence[Mapping[str, Any]]

SAME_TOKENS = "chosen and rejected have the same tokens"


@dataclass(frozen=True)
class EncodedPair:
    """The prompt with the better answer and the prompt with the worse one; only the answers have labels.

    Both show the same images, which are in the prompt.
    """

    chosen: Encoded
    rejected: Encoded

    @property
    def images(self) -> int:
        """How many of the sample's first images and videos are in each half."""
        return self.chosen.images

    @property
    def text_tokens(self) -> int:
        """Tokens of the longer half."""
        return max(self.chosen.text_tokens, self.rejected.text_tokens)

    @property
    def label_tokens(self) -> int:
        """Tokens of both answers."""
        return self.chosen.label_tokens + self.rejected.label_tokens

    @property
    def rewritten(self) -> bool:
        """Whether the chat template leaves out or changes words of either answer."""
        return self.chosen.rewritten or self.rejected.rewritten

    @property
    def cut(self) -> Cut:
        """What was cut from both halves."""
        return Cut(tokens=self.chosen.cut.tokens + self.rejected.cut.tokens)


def encode_pair(
    processor: FlamingoProcessor, sample: Sample, max_text_tokens: int, policy: TooLong = "error"
) -> EncodedPair | Dropped:
    """Encode both halves of a preference sample, each within ``max_text_tokens`` as `encode_within` does.

    A pair is dropped if either half is. Answers come last, so only ``truncate_text`` can keep part of one.
    Raises UserError, naming file and row, as `encode_within` does, and for a sample that is not a pair.
    """
    prompt, *answers = prompt_and_answers(sample)
    prompt = [{**message, "loss": False} for message in prompt]
    halves = []
    for answer in answers:
        messages = cast(list[dict[str, Any]], [*prompt, *answer])
        half = encode_within(processor, replace(sample, messages=messages), max_text_tokens, policy)
        if isinstance(half, Dropped):
            return half
        halves.append(half)
    pair = EncodedPair(*halves)
    if pair.chosen.input_ids != pair.rejected.input_ids:
        return pair
    # The same text twice, or answers that begin alike and were cut.
    if policy == "error":
        raise UserError(f"{sample.where}: {SAME_TOKENS}; remove the row")
    return Dropped(SAME_TOKENS, too_long=pair.cut != Cut())


def collate_pairs(pairs: Sequence[EncodedPair], pad_token_id: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and completion_mask (2 P, T) as in TRL: all chosen first."""
    batch = collate_text([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], pad_token_id)
    return batch | {"completion_mask": (batch.pop("labels") != IGNORED).long()}


def repeat_media(media: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the media of pairs (P, ...) for both halves (2 P, ...)."""
    return {name: torch.cat([tensor, tensor]) for name, tensor in media.items()}


def preference_row(sample: Sample) -> dict[str, Any]:
    """Return a row for `trl.DPOTrainer`: ``prompt``, ``chosen``, ``rejected`` and the opened ``images``.

    Raises UserError, naming file and row, if the sample is not a pair, its answers hold images, it holds
    videos, or an image cannot be read.
    """
    parts = prompt_and_answers(sample)
    if any(isinstance(medium, Video) for medium in sample.images):
        raise UserError(f"{sample.where}: images: got a video; TRL's preference data has images only")
    images = [open_medium(medium, sample.where)[0] for medium in sample.images]
    names = ("prompt", "chosen", "rejected")
    rows = {name: _role_and_content(messages) for name, messages in zip(names, parts, strict=True)}
    return rows | {"images": images}


def prompt_and_answers(sample: Sample) -> tuple[Messages, Messages, Messages]:
    """Return the messages up to the last that is not the assistant's, the better answer and the worse one.

    Raises UserError, naming file and row, if the sample is not a pair or its answers hold images.
    """
    if not sample.rejected:
        raise UserError(f"{sample.where}: rejected: missing; give a worse answer to compare with")
    start = answer_start(sample.messages)
    answers = sample.messages[start:], sample.rejected
    for name, messages in zip(("chosen", "rejected"), answers, strict=True):
        check_answer(messages, f"{sample.where}: {name}")
    return sample.messages[:start], *answers


def answer_start(messages: Messages) -> int:
    """Return the index of the first message after the last that is not the assistant's."""
    return 1 + max((i for i, message in enumerate(messages) if message["role"] != "assistant"), default=-1)


def check_answer(messages: Messages, where: str) -> None:
    """Raise UserError unless the messages are the assistant's, and text."""
    if not messages or any(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: does not end with an assistant message; add the answer")
    if any(is_image(block) for message in messages for block in message["content"]):
        raise UserError(f"{where}: got an image in the answer; preference training takes only text there")


def _role_and_content(messages: Messages) -> list[dict[str, Any]]:
    """Return messages without other keys: TRL's datasets need the same fields in every message and block."""
    return [
        {"role": message["role"], "content": [_without_box(block) for block in message["content"]]}
        for message in messages
    ]


def _without_box(block: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "box"}
