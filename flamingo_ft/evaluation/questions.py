"""Held-out samples as questions with their reference answers, and how long those answers are."""

from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, Protocol, TypeVar

from PIL import Image

from flamingo_ft.adapters.answering import stop_token_ids
from flamingo_ft.data import Sample, encode
from flamingo_ft.data.encode import IGNORED, Encoded
from flamingo_ft.data.pairs import answer_start
from flamingo_ft.data.render import is_document
from flamingo_ft.data.sample import DOCUMENT, Box, Medium, boxes_in, message_text
from flamingo_ft.errors import UserError
from flamingo_ft.inference.prompts import Prompt
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.geometry import ImageGeometry


@dataclass(frozen=True)
class Question(Prompt):
    """A dialogue up to where the assistant answers, with the images so far and the reference answers.

    answer: the reference answer that is trained on. sample: index of the sample that it comes from.
    other_answers: further reference answers. boxes: those in the answer. asked: those in the
    dialogue before it. geometries: of ``images``, if the sample has boxes; see `Sample`.
    """

    answer: str = ""
    task: str = ""
    sample: int = 0
    other_answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    asked: tuple[Box, ...] = ()
    geometries: tuple[ImageGeometry | None, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All answers that count as correct, the one that is trained on first."""
        return (self.answer, *self.other_answers)


def questions_of(samples: Sequence[Sample]) -> list[Question]:
    """Return one question per assistant turn that is trained on; earlier turns are given as they are.

    A document with images is one question: its text up to the last image is the prompt, the rest the answer.
    Of a preference pair, only the turns of the preferred answer count; the turns before it are the prompt. So
    it is with an answer labelled good; one labelled bad is no reference.
    """
    return [question for index, sample in enumerate(samples) for question in _questions(sample, index)]


def _questions(sample: Sample, index: int) -> Iterator[Question]:
    """Yield the questions of a sample. A sample with several reference answers has one question."""
    if sample.label is False:
        return
    first = answer_start(sample.messages) if sample.rejected or sample.label else 0
    for turn, message in enumerate(sample.messages):
        if message["role"] == "assistant" and message.get("loss") is not False and turn >= first:
            yield _question(sample, index, sample.messages[:turn], message)
        elif message["role"] == DOCUMENT and sample.images:
            blocks = message["content"]
            after_last = 1 + max(i for i, block in enumerate(blocks) if block["type"] == "image")
            prompt, answer = (
                {**message, "content": part} for part in (blocks[:after_last], blocks[after_last:])
            )
            yield _question(sample, index, [prompt], answer)


def _question(
    sample: Sample, index: int, before: list[dict[str, Any]], answer: Mapping[str, Any]
) -> Question:
    mentioned = sum(block["type"] == "image" for message in before for block in message["content"])
    text, others = message_text(answer), sample.other_answers
    if answer["role"] == DOCUMENT:
        text, others = text.strip(), tuple(other.strip() for other in others)
    boxes, asked = (
        tuple(sample.boxes[number] for message in part for number in boxes_in(message))
        for part in ([answer], before)
    )
    return Question(
        before, sample.images[:mentioned], sample.where, text, sample.task, index, others, boxes, asked,
        sample.geometries[:mentioned],
    )  # fmt: skip


class HasImages(Protocol):
    """A dataclass with ``images``: a `Sample`, or an example of a task."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def images(self) -> Sequence[Medium]: ...


Shown = TypeVar("Shown", bound=HasImages)


def with_other_images(samples: Sequence[Shown], seed: int = 0) -> list[Shown]:
    """Return every sample with the images of another sample that has as many.

    If possible, none of the images is the sample's own; otherwise at least one differs. A sample keeps its
    own images only if no other sample has as many. A model that answers these samples as well as the
    originals ignores images.
    """
    by_count = defaultdict(list)
    for index, sample in enumerate(samples):
        by_count[len(sample.images)].append(index)
    images = {}
    for indices in by_count.values():
        random.Random(seed).shuffle(indices)
        choices = [samples[index].images for index in indices]
        for position, index in enumerate(indices):
            images[index] = _other_images(choices, position)
    return [replace(sample, images=images[index]) for index, sample in enumerate(samples)]


def with_gray_images(samples: Sequence[Shown]) -> list[Shown]:
    """Return every sample with a gray image in place of each of its own."""
    return [replace(sample, images=[gray_image()] * len(sample.images)) for sample in samples]


def gray_image() -> bytes:
    """Return a gray picture as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def _other_images(choices: Sequence[Sequence[Medium]], position: int) -> Sequence[Medium]:
    """Return the next choice that shares no image with the one at ``position``, or the next that differs."""
    own = choices[position]
    differing = None
    for step in range(1, len(choices)):
        images = choices[(position + step) % len(choices)]
        if not set(images) & set(own):
            return images
        if images != own and differing is None:
            differing = images
    return own if differing is None else differing


@dataclass
class AnswerLengths:
    """Lengths of reference answers, in tokens with the end token.

    answers: number of reference answers; too_long: those of more than ``max_new_tokens``, which generation
    would cut off; longest: tokens of the longest.
    """

    max_new_tokens: int
    answers: int = 0
    too_long: int = 0
    longest: int = 0

    def add(self, lengths: Iterable[int]) -> None:
        """Count the answers of one sample, given their lengths in tokens."""
        for length in lengths:
            self.answers += 1
            self.too_long += length > self.max_new_tokens
            self.longest = max(self.longest, length)

    @property
    def warning(self) -> str | None:
        """One line if generated answers would be cut off before they could match, otherwise None."""
        if not self.too_long:
            return None
        verb = "is" if self.too_long == 1 else "are"
        return (
            f"eval.max_new_tokens: {self.too_long:,} of {self.answers:,} reference answers {verb} longer "
            f"than {self.max_new_tokens} tokens (longest: {self.longest}, end token included), "
            f"so a correct answer would be cut off; use {self.longest} or more"
        )


def measure_answers(
    processor: FlamingoProcessor, samples: Iterable[Sample], max_new_tokens: int
) -> AnswerLengths:
    """Measure the reference answers of ``samples``, skipping samples that cannot be encoded."""
    lengths, end_tokens = AnswerLengths(max_new_tokens), end_tokens_of(processor)
    for sample in samples:
        try:
            encoded = encode(processor, sample)
        except UserError:
            continue  # asking the question needs only its prompt; such a sample has no answer to measure
        lengths.add(answer_lengths(processor, sample, encoded, end_tokens))
    return lengths


def answer_lengths(
    processor: FlamingoProcessor, sample: Sample, encoded: Encoded, end_tokens: frozenset[int]
) -> list[int]:
    """Return the tokens of each answer that evaluation asks for, end token included.

    These are the same answers as in `questions_of`. encoded: the whole sample.
    """
    begin = 0
    if is_document(sample.messages):
        if processor.image_token_id not in encoded.input_ids:
            return []
        begin = len(encoded.input_ids) - encoded.input_ids[::-1].index(processor.image_token_id)
    by_loss = groupby(encoded.labels[begin:], lambda label: label != IGNORED)
    answers = [list(labels) for has_loss, labels in by_loss if has_loss]
    if sample.rejected or sample.label:
        answers = answers[-1:]
    return [_length(answer, end_tokens) for answer in answers]


def end_tokens_of(processor: FlamingoProcessor) -> frozenset[int]:
    """Return the tokens at which generation stops that are known from the processor alone."""
    return frozenset(stop_token_ids(processor, processor.tokenizer.eos_token_id))


def _length(answer: Sequence[int], end_tokens: frozenset[int]) -> int:
    """Tokens to generate, up to the first end token; a template may have a line break after it."""
    for length, token in enumerate(answer, start=1):
        if token in end_tokens:
            return length
    return len(answer)
