"""A pair of answers in token ids, as preference training takes it: the prompt twice, each time with another answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor

from .collate import collate_text
from .encode import IGNORED, Cut, Encoded
from .preference import prompt_and_answers
from .sample import Sample
from .too_long import Dropped, TooLong, encode_within

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
    return _told_apart(EncodedPair(*halves), sample, policy)


def _told_apart(pair: EncodedPair, sample: Sample, policy: TooLong) -> EncodedPair | Dropped:
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


def twice(media: dict[str, Tensor]) -> dict[str, Tensor]:
    """The media (P, ...) of pairs for both halves, (2 P, ...)."""
    return {name: torch.cat([tensor, tensor]) for name, tensor in media.items()}
