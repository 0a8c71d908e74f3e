"""Answers labelled good or bad, for KTO: as token ids, and as TRL's trainer takes them.

A preference pair is two of them, with the same prompt. Shapes: B answers, T text tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor

from .collate import collate_text
from .encode import IGNORED, Dropped, Encoded, TooLong, encode_within
from .pairs import answer_start, check_answer, prompt_and_answers
from .sample import Sample
from .sample_order import WeightedSource

MAX_LABELS_READ = 50_000  # rows of a streamed source, to find a good and a bad answer
SPREAD_ROWS = 1_000  # rows of an indexed source read first, evenly spaced


@dataclass(frozen=True)
class EncodedAnswer(Encoded):
    """A prompt with one answer, which alone has labels. desirable: whether the answer is good."""

    desirable: bool = True

    @property
    def answer_begins(self) -> int:
        """Index of the answer's first token."""
        return next(index for index, label in enumerate(self.labels) if label != IGNORED)


def encode_unpaired(
    processor: FlamingoProcessor, sample: Sample, max_text_tokens: int, policy: TooLong = "error"
) -> EncodedAnswer | Dropped:
    """Encode a labelled answer within ``max_text_tokens``, as `encode_within` does.

    Raises UserError, naming file and row, as `encode_within` does, and for a sample without a label.
    """
    if sample.label is None:
        raise UserError(f"{sample.where}: label: missing; say whether the answer is good: true or false")
    start = answer_start(sample.messages)
    check_answer(sample.messages[start:], f"{sample.where}: completion")
    prompt = [{**message, "loss": False} for message in sample.messages[:start]]
    whole = replace(sample, messages=[*prompt, *sample.messages[start:]])
    encoded = encode_within(processor, whole, max_text_tokens, policy)
    if isinstance(encoded, Dropped):
        return encoded
    values = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return EncodedAnswer(**values, desirable=sample.label)


def collate_answers(answers: Sequence[EncodedAnswer], pad_token_id: int, limit: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and completion_mask (B, T), and label (B,), as in TRL.

    The same with ``KL_`` before their names: each prompt with the answer of the row before it, cut to
    ``limit`` tokens. KTO measures on these how far the model has moved from the reference.
    """
    others = [answers[-1], *answers[:-1]]
    mismatched = [_with_answer_of(own, other, limit) for own, other in zip(answers, others, strict=True)]
    batch = _with_mask(collate_text(answers, pad_token_id))
    batch |= {
        f"KL_{name}": tensor for name, tensor in _with_mask(collate_text(mismatched, pad_token_id)).items()
    }
    return batch | {"label": torch.tensor([answer.desirable for answer in answers])}


def _with_answer_of(own: EncodedAnswer, other: EncodedAnswer, limit: int) -> Encoded:
    """Return the prompt of one row with the answer of another."""
    prompt, answer = own.answer_begins, other.answer_begins
    ids = own.input_ids[:prompt] + other.input_ids[answer:]
    labels = own.labels[:prompt] + other.labels[answer:]
    return Encoded(ids[:limit], labels[:limit])


def _with_mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace ``labels`` by the mask of the tokens that have one."""
    return batch | {"completion_mask": (batch.pop("labels") != IGNORED).long()}


# --- preference pairs as labelled answers ---


def good_answer(sample: Sample) -> Sample:
    """Return the better half of a preference pair, labelled good."""
    prompt, chosen, _ = prompt_and_answers(sample)
    return replace(sample, messages=[*map(dict, (*prompt, *chosen))], rejected=None, label=True)


def bad_answer(sample: Sample) -> Sample:
    """Return the worse half of a preference pair, labelled bad."""
    prompt, _, rejected = prompt_and_answers(sample)
    return replace(sample, messages=[*map(dict, (*prompt, *rejected))], rejected=None, label=False)


HALVES = (good_answer, bad_answer)


def labelled_answers(sample: Sample) -> list[Sample]:
    """Return both halves of a preference pair, or a labelled answer itself."""
    return [half(sample) for half in HALVES] if sample.rejected else [sample]


def unpaired_sources(sources: Sequence[WeightedSource]) -> list[WeightedSource]:
    """Return the sources, each one of preference pairs twice: once for the good answers, once for the bad."""
    return [
        replace(weighted, source=weighted.source.with_samples(half)) if half else weighted
        for weighted in sources
        for half in (HALVES if weighted.source.is_preference else (None,))
    ]


def check_both_labels(sources: Sequence[WeightedSource]) -> None:
    """Raise UserError if all rows, of a streamed source the first `MAX_LABELS_READ`, have the same label.

    Such a run would raise or lower every probability, whatever the answer says. Reads the sources in turn, a
    row of each, up to the first good and bad answer; unusable rows are skipped here.
    """
    labels: set[bool | None] = set()
    for in_turn in itertools.zip_longest(*map(_labels, sources)):
        labels.update(in_turn)
        if {True, False} <= labels:
            return
    only = "good answers (label true)" if True in labels else "bad answers (label false)"
    missing = "bad" if True in labels else "good"
    names = ", ".join(dict.fromkeys(weighted.source.name for weighted in sources))
    is_streamed = not all(weighted.source.indexed for weighted in sources)
    where = f" (of a stream, the first {MAX_LABELS_READ:,} rows are read)" if is_streamed else ""
    raise UserError(
        f"{names}: train.method kto compares good answers with bad ones, got only {only}{where}; "
        f"add {missing} ones, or set train.method to sft for good ones alone"
    )


def _labels(weighted: WeightedSource) -> Iterator[bool]:
    """Yield the labels of the rows that can be read."""
    source = weighted.source
    if source.is_preference:
        yield from (True, False)
        return
    if source.indexed:
        numbers = np.arange(len(source)) if weighted.rows is None else weighted.rows
        rows = ((row, source.raw(row)) for row in _evenly_spaced_first(numbers))
    else:
        rows = itertools.islice(enumerate(source.stream()), MAX_LABELS_READ)
    for row, raw in rows:
        try:
            label = source.sample(row, raw).label
        except UserError:
            continue
        if label is not None:
            yield label


def _evenly_spaced_first(rows: np.ndarray) -> Iterator[int]:
    """Yield every row once, evenly spaced ones first: a file may be sorted by label."""
    step = max(1, len(rows) // SPREAD_ROWS)
    return itertools.chain.from_iterable(rows[start::step].tolist() for start in range(step))
