"""Pairs of a better and a worse answer, as TRL's DPOTrainer takes them.

A pair of answers in token ids, as preference training takes it: the prompt twice, each time with another answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, is_image

from .collate import collate_text
from .encode import IGNORED, Cut, Dropped, Encoded, TooLong, encode_within
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


ALIKE = "found the same tokens in chosen and rejected"


@dataclass(frozen=True)
class EncodedPair:
    """The prompt with the better answer and the prompt with the worse one; only the answers have labels.

    Both show the same images, which stand in the prompt.
    """

    chosen: Encoded
    rejected: Encoded

    @property
    def images(self) -> int:
        """How many of the sample's first images and videos stand in either half."""
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
        """What was taken away of both halves."""
        return Cut(tokens=self.chosen.cut.tokens + self.rejected.cut.tokens)


def encode_pair(
    processor: FlamingoProcessor, sample: Sample, max_text_tokens: int, policy: TooLong = "error"
) -> EncodedPair | Dropped:
    """Both halves of a preference sample, each within ``max_text_tokens`` as `encode_within` has it.

    A pair of which a half is dropped is dropped: the answers stand at the end, so no policy but truncate_text leaves
    anything of them. Raises UserError, naming file and row, where `encode_within` does, and for a sample that is no pair.
    """
    prompt, *answers = prompt_and_answers(sample)
    given = [{**message, "loss": False} for message in prompt]
    halves = []
    for answer in answers:
        half = encode_within(processor, replace(sample, messages=[*given, *answer]), max_text_tokens, policy)
        if isinstance(half, Dropped):
            return half
        halves.append(half)
    return _check_distinct(EncodedPair(*halves), sample, policy)


def _check_distinct(pair: EncodedPair, sample: Sample, policy: TooLong) -> EncodedPair | Dropped:
    """The pair, unless there is nothing to prefer; so it is where both answers begin alike and were cut."""
    if pair.chosen.input_ids != pair.rejected.input_ids:
        return pair
    if policy == "error":
        raise UserError(f"{sample.where}: {ALIKE}; remove the row")
    return Dropped(ALIKE, too_long=pair.cut != Cut())


def collate_pairs(pairs: Sequence[EncodedPair], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask (2 P, T) of P pairs as TRL has them: all chosen, then all rejected."""
    batch = collate_text([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], pad_token_id)
    return batch | {"completion_mask": (batch.pop("labels") != IGNORED).long()}


def repeat_media(media: dict[str, Tensor]) -> dict[str, Tensor]:
    """The media (P, ...) of pairs for both halves, (2 P, ...)."""
    return {name: torch.cat([tensor, tensor]) for name, tensor in media.items()}
