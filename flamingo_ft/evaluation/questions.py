"""Held-out samples as questions with one right answer each."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flamingo_ft.data.pairs import answer_start
from flamingo_ft.data.sample import DOCUMENT, Medium, Sample, message_text


@dataclass(frozen=True)
class Question:
    """A dialogue up to where the assistant is to speak, with the images it has mentioned, and the right answer."""

    messages: list[dict[str, Any]]
    images: list[Medium]
    answer: str
    task: str
    where: str
    sample: int


def questions_of(samples: Sequence[Sample]) -> list[Question]:
    """One question for each assistant turn but those without loss; the turns before it are given as they should be.

    Of a document, one: what follows its last image, its beginning given. Without an image, none. Of a pair of answers,
    the better one's: what is said before belongs to the prompt.
    """
    return [question for number, sample in enumerate(samples) for question in _questions(sample, number)]


def _questions(sample: Sample, number: int) -> Iterator[Question]:
    first = answer_start(sample.messages) if sample.rejected else 0
    for turn, message in enumerate(sample.messages):
        if message["role"] == "assistant" and message.get("loss") is not False and turn >= first:
            yield _question(sample, number, sample.messages[:turn], message_text(message))
        elif message["role"] == DOCUMENT and sample.images:
            blocks = message["content"]
            after_last = 1 + max(i for i, block in enumerate(blocks) if block["type"] == "image")
            answer = message_text({"content": blocks[after_last:]}).strip()
            yield _question(sample, number, [{**message, "content": blocks[:after_last]}], answer)


def _question(sample: Sample, number: int, before: list[dict[str, Any]], answer: str) -> Question:
    mentioned = sum(block["type"] == "image" for message in before for block in message["content"])
    return Question(before, sample.images[:mentioned], answer, sample.task, sample.where, number)


def with_other_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Every sample with the images of another sample that has as many.

    None of them is its own where a sample has such images, at least one is not where a sample has other images at
    all, and only a sample without a counterpart keeps its own. A model that answers these as well as the true ones
    does not look.
    """
    by_count = defaultdict(list)
    for number, sample in enumerate(samples):
        by_count[len(sample.images)].append(number)
    images = {}
    for numbers in by_count.values():
        random.Random(seed).shuffle(numbers)
        choices = [samples[number].images for number in numbers]
        for place, number in enumerate(numbers):
            images[number] = _other_images(choices, place)
    return [replace(sample, images=images[number]) for number, sample in enumerate(samples)]


def _other_images(choices: Sequence[list[Medium]], place: int) -> list[Medium]:
    """The first choice after ``place`` that shares no image with the one there; else the first that differs."""
    own = choices[place]
    differing = None
    for step in range(1, len(choices)):
        images = choices[(place + step) % len(choices)]
        if not set(images) & set(own):
            return images
        if images != own and differing is None:
            differing = images
    return own if differing is None else differing


def as_row(question: Question) -> dict[str, Any]:
    """The question as the generating functions take it."""
    return dict(vars(question))
