"""How long the reference answers are, against the longest answer that evaluation lets the model generate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from flamingo_ft.data import Sample, encode
from flamingo_ft.data.encode import IGNORED, Encoded, end_token_id
from flamingo_ft.data.render import is_document
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.added_tokens import EOC_TOKEN


@dataclass
class AnswerLengths:
    """answers: how many reference answers there are; too_long: those of more than ``max_new_tokens`` tokens, end token
    included; longest: tokens of the longest."""

    max_new_tokens: int
    answers: int = 0
    too_long: int = 0
    longest: int = 0

    def add(self, lengths: Iterable[int]) -> None:
        """Count the answers of one sample, given in tokens."""
        for length in lengths:
            self.answers += 1
            self.too_long += length > self.max_new_tokens
            self.longest = max(self.longest, length)

    @property
    def warning(self) -> str | None:
        """One line where generated answers would be cut off before they could match; None where none would."""
        if not self.too_long:
            return None
        verb = "is" if self.too_long == 1 else "are"
        return (
            f"eval.max_new_tokens: {self.too_long:,} of {self.answers:,} reference answers {verb} longer than "
            f"{self.max_new_tokens} tokens (longest: {self.longest}, end token included), "
            f"so a right answer would be cut off; use {self.longest} or more"
        )


def measure_answers(
    processor: FlamingoProcessor, samples: Iterable[Sample], max_new_tokens: int
) -> AnswerLengths:
    """The lengths of the reference answers of ``samples``, leaving out samples that cannot be encoded."""
    lengths, ends = AnswerLengths(max_new_tokens), answer_ends(processor)
    for sample in samples:
        try:
            encoded = encode(processor, sample)
        except UserError:
            continue  # questions need only the prompt encoded; such a sample has no answer to measure
        lengths.add(answers_of(processor, sample, encoded, ends))
    return lengths


def answers_of(
    processor: FlamingoProcessor, sample: Sample, encoded: Encoded, ends: frozenset[int]
) -> list[int]:
    """Tokens of each answer that evaluation asks for, end token included.

    These are all assistant turns with loss, of a preference pair the last one, of a document the text after its last
    image. encoded: the whole sample.
    """
    begin = 0
    if is_document(sample.messages):
        if processor.image_token_id not in encoded.input_ids:
            return []
        begin = len(encoded.input_ids) - encoded.input_ids[::-1].index(processor.image_token_id)
    runs = [
        list(run)
        for learned, run in groupby(encoded.labels[begin:], lambda label: label != IGNORED)
        if learned
    ]
    return [_until_end(run, ends) for run in (runs[-1:] if sample.rejected else runs)]


def answer_ends(processor: FlamingoProcessor) -> frozenset[int]:
    """The tokens at which generation stops."""
    try:
        in_template = end_token_id(processor)
    except UserError:  # a template that does not show one
        in_template = None
    tokenizer = processor.tokenizer
    found = (in_template, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EOC_TOKEN))
    return frozenset(token for token in found if token is not None)


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> int:
    """How many tokens have to be generated: up to the first end token, which a line break may follow in a template."""
    return next((number for number, token in enumerate(tokens, start=1) if token in ends), len(tokens))
