"""Batches do not depend on the number of workers, resume at the exact sample, and skip bad rows."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from itertools import count, islice

import pytest
import torch
from torch.utils.data import Dataset

from flamingo_ft.data.batches import (
    Batches,
    LoaderConfig,
    one_sample_per_row,
    pack_tensors,
    packed_rows,
    sorted_by_length,
    unpack_tensors,
)
from flamingo_ft.data.encode import Dropped, Encoded
from flamingo_ft.data.examples import DataStats, Example, ExampleDataset
from flamingo_ft.data.feature_cache import Frame
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.sample_order import SampleIndex, SampleOrder, WeightedSource
from flamingo_ft.errors import UserError
from tests.data.fakes import Numbers


@dataclass(frozen=True)
class Encode:
    """Encodes a number as some tokens, or drops it if it is in ``dropped``."""

    dropped: frozenset[int] = frozenset()

    def __call__(self, sample: Sample) -> Encoded | Dropped:
        number = int(sample.messages[0]["content"][0]["text"])
        if number in self.dropped:
            return Dropped(f"{sample.where}: too long")
        ids = [number] * (1 + number % 5)
        return Encoded(ids, ids)


def sample_number(sample: Sample, kept: int, number: int) -> list[int]:
    return [number]


def assemble(rows) -> dict[str, list]:
    samples = [sample for row in rows for sample in row]
    return {
        "rows": [[sample.encoded.input_ids[0] for sample in row] for row in rows],
        "numbers": {sample.media[0]: sample.encoded.input_ids[0] for sample in samples},
    }


def batches(
    *sources,
    size=4,
    workers=0,
    dropped=(),
    skip=True,
    share=1.0,
    grouping=False,
    group_rows=None,
    rank=0,
    world=1,
):
    order = SampleOrder([WeightedSource(source) for source in sources], seed=3, shuffle_buffer=5)
    stats = DataStats(skip, share, order.epoch_length)
    indices = sorted_by_length(order, lambda index: index.row, size) if grouping else order.indices
    dataset = ExampleDataset(sources, Encode(frozenset(dropped)), sample_number)
    return Batches(
        indices,
        dataset,
        group_rows or one_sample_per_row(size),
        assemble,
        stats,
        LoaderConfig(size, workers, rank, world),
    )


def taken(made: Batches, count: int) -> list[list[list[int]]]:
    """Return the numbers in the rows of the next batches."""
    return [batch["rows"] for batch in islice(made, count)]


def flat(batches_taken) -> list[int]:
    return [number for batch in batches_taken for row in batch for number in row]


# More workers than cores, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
BAD = frozenset({1, 8, 13})
SOURCES = {
    "indexed": lambda: (Numbers(20, bad=BAD), Numbers(7)),
    "streamed": lambda: (Numbers(20, indexed=False, bad=BAD), Numbers(7)),
}


OPTIONS = {"plain": {}, "grouped": {"grouping": True}, "packed": {"group_rows": packed_rows(2, 9)}}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batches_do_not_depend_on_the_number_of_workers(kind, options):
    expected = taken(batches(*SOURCES[kind](), dropped=[2], **options), 12)
    assert taken(batches(*SOURCES[kind](), dropped=[2], workers=1, **options), 12) == expected
    assert taken(batches(*SOURCES[kind](), dropped=[2], workers=3, **options), 12) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_resumes_at_the_exact_sample(kind, options, workers):
    whole = batches(*SOURCES[kind](), dropped=[2], **options)
    expected = taken(whole, 12)
    first = batches(*SOURCES[kind](), dropped=[2], workers=workers, **options)
    before = taken(first, 5)
    second = batches(*SOURCES[kind](), dropped=[2], workers=workers, **options)
    second.load_state_dict(first.state_dict())
    assert before + taken(second, 7) == expected
    assert second.stats.metrics() == whole.stats.metrics()


def test_randomness_of_a_sample_depends_only_on_its_number_in_the_run():
    plain, grouped = ({}, {})
    for batch in islice(batches(Numbers(30)), 6):
        plain |= batch["numbers"]
    for batch in islice(batches(Numbers(30), grouping=True, workers=2), 6):
        grouped |= batch["numbers"]
    assert {*plain} & {*grouped} and all(
        plain[number] == row for number, row in grouped.items() if number in plain
    )


def test_packed_rows_fit_the_row_length_and_have_every_sample_once():
    made = batches(Numbers(40), group_rows=packed_rows(2, 9))
    rows = [row for batch in taken(made, 12) for row in batch]
    assert all(sum(1 + number % 5 for number in row) <= 9 for row in rows)
    assert max(map(len, rows)) > 1
    used = [number for row in rows for number in row]
    assert len(used) == made.stats.seen - len(made.state_dict()["waiting"])


def test_ranks_split_the_samples_without_overlap():
    all_numbers = sorted(flat(taken(batches(Numbers(24)), 6)))
    parts = [taken(batches(Numbers(24), rank=rank, world=3), 2) for rank in range(3)]
    assert sorted(number for part in parts for number in flat(part)) == all_numbers


def test_bad_rows_are_skipped_counted_and_listed():
    made = batches(Numbers(20, bad=BAD), dropped=[5, 6])
    rows = flat(taken(made, 15))
    assert not {*rows} & {*BAD, 5, 6} and {*rows} == {*range(20)} - {*BAD, 5, 6}
    metrics = made.stats.metrics()
    assert metrics["rows"] == len(rows) + metrics["skipped"] + metrics["dropped"]
    assert {*made.stats.skipped_rows} == {f"numbers: row {row}" for row in (*BAD, 5, 6)}
    assert made.stats.skipped_rows["numbers: row 5"] == "numbers: row 5: too long"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_raises_its_own_error_unless_bad_rows_are_skipped(workers):
    with pytest.raises(UserError) as caught:
        taken(batches(Numbers(20, bad=BAD), skip=False, workers=workers), 10)
    assert str(caught.value) in {
        f"numbers: row {row}: expected a number, got nothing; remove the row" for row in BAD
    }


def test_too_many_bad_rows_raise_even_if_bad_rows_are_skipped():
    assert taken(batches(Numbers(20, bad=BAD), share=0.15), 20)  # three of twenty, epoch after epoch
    with pytest.raises(
        UserError, match=r"data.max_bad_share: got 3 of \d+ rows bad, more than 0.1 of them .* fix them"
    ):
        taken(batches(Numbers(20, bad=BAD), share=0.1), 20)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_run_without_usable_samples_raises(indexed):
    all_numbers = frozenset(range(6))
    with pytest.raises(UserError, match="no sample to train on among"):
        taken(batches(Numbers(6, indexed), dropped=all_numbers), 1)


def test_loading_does_not_consume_random_numbers_of_torch():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    taken(batches(Numbers(20)), 3)
    assert torch.equal(torch.rand(1), expected)


OPEN_FILES = "/proc/self/fd"


def test_packed_tensors_are_unpacked_unchanged():
    pixels, tokens = torch.randn(2, 3, 4, 5), torch.randn(4, 6).bfloat16().t()
    rows = [
        (7, Example("a: row 0", Encoded([1, 2], [-100, 2], 2), [pixels, torch.empty(0, 3)])),
        (
            8,
            Example(
                "a: row 1", Encoded([1], [1], 1), [[Frame("k", tokens=tokens), Frame("l", pixels=pixels[0])]]
            ),
        ),
        (9, "skipped"),
    ]
    (_, first), (_, second), last = unpack_tensors(pickle.loads(pickle.dumps(pack_tensors(rows))))
    assert (first.where, first.encoded, last) == ("a: row 0", rows[0][1].encoded, (9, "skipped"))
    assert torch.equal(first.media[0], pixels) and first.media[1].shape == (0, 3)
    assert (
        torch.equal(second.media[0][0].tokens, tokens) and second.media[0][0].tokens.dtype == torch.bfloat16
    )
    assert second.media[0][0].pixels is None and torch.equal(second.media[0][1].pixels, pixels[0])


@dataclass(frozen=True)
class Picture(Dataset):
    """Rows of one image and a few tokens."""

    def __getitem__(self, index: SampleIndex) -> Example:
        tokens = [index.number] * 3
        return Example("", Encoded(tokens, tokens, 1), [torch.full((1, 3, 4, 4), index.number)])


@pytest.mark.skipif(not os.path.isdir(OPEN_FILES), reason="counts open files in Linux's /proc")
def test_examples_held_back_for_packing_hold_no_files_open():
    def indices(start):
        return (SampleIndex(number, 0, number) for number in count(start))

    def assemble(rows):
        return [
            (example.encoded.input_ids[0], int(example.media[0][0, 0, 0, 0]))
            for row in rows
            for example in row
        ]

    stats = DataStats(skip_bad=False, max_bad_share=0, epoch_length=None)
    before = len(os.listdir(OPEN_FILES))
    batches = iter(
        Batches(indices, Picture(), packed_rows(1, 90), assemble, stats, LoaderConfig(1, workers=1))
    )
    first = next(batches)
    assert len(first) == 30 and all(token == pixel for token, pixel in first)
    assert stats.seen > 400  # samples in rows that are still open
    assert len(os.listdir(OPEN_FILES)) - before < 50
    assert all(token == shown for batch in islice(batches, 3) for token, shown in batch)
