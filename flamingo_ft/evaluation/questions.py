"""Held-out samples as questions with one right answer each."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flamingo_ft.data.encode import text_of
from flamingo_ft.data.samples import Sample


@dataclass(frozen=True)
class Question:
    """A dialogue up to where the assistant is to speak, with the images it has mentioned, and what is to be said."""

    messages: list[dict[str, Any]]
    images: list[str]
    answer: str
    task: str
    where: str
    sample: int


def questions_of(samples: Sequence[Sample]) -> list[Question]:
    """One question for each assistant turn; the turns before it are given as they should have been."""
    return [
        _question(sample, number, turn)
        for number, sample in enumerate(samples)
        for turn, message in enumerate(sample.messages)
        if message["role"] == "assistant"
    ]


def _question(sample: Sample, number: int, turn: int) -> Question:
    before = sample.messages[:turn]
    mentioned = sum(block["type"] == "image" for message in before for block in message["content"])
    return Question(
        before, sample.images[:mentioned], text_of(sample.messages[turn]), sample.task, sample.where, number
    )


def with_other_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Every sample with the images of another sample that has as many; a lone one keeps its own.

    A model that answers these as well as the true ones does not look.
    """
    by_count = defaultdict(list)
    for number, sample in enumerate(samples):
        by_count[len(sample.images)].append(number)
    images = {}
    for numbers in by_count.values():
        random.Random(seed).shuffle(numbers)
        for number, other in zip(numbers, numbers[1:] + numbers[:1], strict=True):
            images[number] = samples[other].images
    return [replace(sample, images=images[number]) for number, sample in enumerate(samples)]


def as_row(question: Question) -> dict[str, Any]:
    """The question as the generating functions take it."""
    return asdict(question)
