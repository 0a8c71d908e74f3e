"""Batches are the same whatever the number of workers, go on where they stopped, and leave out what is
bad."""

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
    """A number to some tokens; those in ``dropped`` are dropped."""

    dropped: frozenset[int] = frozenset()

    def __call__(self, sample: Sample) -> Encoded | Dropped:
        number = int(sample.messages[0]["content"][0]["text"])
        if number in self.dropped:
            return Dropped(f"{sample.where}: too long")
        ids = [number] * (1 + number % 5)
        return Encoded(ids, ids)


def draw_number(sample: Sample, kept: int, number: int) -> list[int]:
    return [number]


def assemble(rows) -> dict[str, list]:
    samples = [sample for row in rows for sample in row]
    return {
        "rows": [[sample.encoded.input_ids[0] for sample in row] for row in rows],
        "draws": {sample.media[0]: sample.encoded.input_ids[0] for sample in samples},
    }


def batches(
    *sources, size=4, workers=0, dropped=(), skip=True, share=1.0, grouping=False, fill=None, rank=0, world=1
):
    order = SampleOrder([WeightedSource(source) for source in sources], seed=3, shuffle_buffer=5)
    stats = DataStats(skip, share, order.epoch_length)
    draws = sorted_by_length(order, lambda draw: draw.row, size) if grouping else order.indices
    prepare = ExampleDataset(sources, Encode(frozenset(dropped)), draw_number)
    return Batches(
        draws,
        prepare,
        fill or one_sample_per_row(size),
        assemble,
        stats,
        LoaderConfig(size, workers, rank, world),
    )


def taken(made: Batches, count: int) -> list[list[list[int]]]:
    """The numbers in the rows of the next batches."""
    return [batch["rows"] for batch in islice(made, count)]


def flat(batches_taken) -> list[int]:
    return [number for batch in batches_taken for row in batch for number in row]


pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores, on purpose
BAD = frozenset({1, 8, 13})
SOURCES = {
    "indexed": lambda: (Numbers(20, bad=BAD), Numbers(7)),
    "streamed": lambda: (Numbers(20, indexed=False, bad=BAD), Numbers(7)),
}


WAYS = {"plain": {}, "grouped": {"grouping": True}, "packed": {"fill": packed_rows(2, 9)}}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_number_of_workers_changes_nothing(kind, options):
    expected = taken(batches(*SOURCES[kind](), dropped=[2], **options), 12)
    assert taken(batches(*SOURCES[kind](), dropped=[2], workers=1, **options), 12) == expected
    assert taken(batches(*SOURCES[kind](), dropped=[2], workers=3, **options), 12) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_run_goes_on_at_the_exact_sample(kind, options, workers):
    whole = batches(*SOURCES[kind](), dropped=[2], **options)
    expected = taken(whole, 12)
    first = batches(*SOURCES[kind](), dropped=[2], workers=workers, **options)
    before = taken(first, 5)
    second = batches(*SOURCES[kind](), dropped=[2], workers=workers, **options)
    second.load_state_dict(first.state_dict())
    assert before + taken(second, 7) == expected
    assert second.stats.metrics() == whole.stats.metrics()


def test_what_is_random_of_a_draw_depends_on_its_number_alone():
    plain, grouped = ({}, {})
    for batch in islice(batches(Numbers(30)), 6):
        plain |= batch["draws"]
    for batch in islice(batches(Numbers(30), grouping=True, workers=2), 6):
        grouped |= batch["draws"]
    assert {*plain} & {*grouped} and all(
        plain[number] == row for number, row in grouped.items() if number in plain
    )


def test_packed_rows_are_no_longer_than_asked_and_hold_every_sample_once():
    made = batches(Numbers(40), fill=packed_rows(2, 9))
    rows = [row for batch in taken(made, 12) for row in batch]
    assert all(sum(1 + number % 5 for number in row) <= 9 for row in rows)
    assert max(map(len, rows)) > 1
    given = [number for row in rows for number in row]
    assert len(given) == made.stats.seen - len(made.state_dict()["waiting"])


def test_processes_share_the_draws_out():
    everything = sorted(flat(taken(batches(Numbers(24)), 6)))
    shares = [taken(batches(Numbers(24), rank=rank, world=3), 2) for rank in range(3)]
    assert sorted(number for share in shares for number in flat(share)) == everything


def test_bad_rows_are_left_out_counted_and_named():
    made = batches(Numbers(20, bad=BAD), dropped=[5, 6])
    rows = flat(taken(made, 15))
    assert not {*rows} & {*BAD, 5, 6} and {*rows} == {*range(20)} - {*BAD, 5, 6}
    record = made.stats.metrics()
    assert record["rows"] == len(rows) + record["skipped"] + record["dropped"]
    assert {*made.stats.skipped_rows} == {f"numbers: row {row}" for row in (*BAD, 5, 6)}
    assert made.stats.skipped_rows["numbers: row 5"] == "numbers: row 5: too long"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_ends_a_run_that_does_not_skip_with_its_own_line(workers):
    with pytest.raises(UserError) as caught:
        taken(batches(Numbers(20, bad=BAD), skip=False, workers=workers), 10)
    assert str(caught.value) in {
        f"numbers: row {row}: expected a number, got nothing; remove the row" for row in BAD
    }


def test_too_many_bad_rows_end_a_run_that_skips():
    assert taken(batches(Numbers(20, bad=BAD), share=0.15), 20)  # three of twenty, epoch after epoch
    with pytest.raises(
        UserError, match=r"data.max_bad_share: got 3 of \d+ rows bad, more than 0.1 of them .* fix them"
    ):
        taken(batches(Numbers(20, bad=BAD), share=0.1), 20)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_run_without_a_single_sample_ends(indexed):
    everything = frozenset(range(6))
    with pytest.raises(UserError, match="no sample to train on among"):
        taken(batches(Numbers(6, indexed), dropped=everything), 1)


def test_loading_leaves_the_random_numbers_alone():
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
        (9, "left out"),
    ]
    (_, one), (_, two), last = unpack_tensors(pickle.loads(pickle.dumps(pack_tensors(rows))))
    assert (one.where, one.encoded, last) == ("a: row 0", rows[0][1].encoded, (9, "left out"))
    assert torch.equal(one.media[0], pixels) and one.media[1].shape == (0, 3)
    assert torch.equal(two.media[0][0].tokens, tokens) and two.media[0][0].tokens.dtype == torch.bfloat16
    assert two.media[0][0].pixels is None and torch.equal(two.media[0][1].pixels, pixels[0])


@dataclass(frozen=True)
class Picture(Dataset):
    """Rows of one image and a few tokens."""

    def __getitem__(self, draw: SampleIndex) -> Example:
        return Example(
            "", Encoded([draw.number] * 3, [draw.number] * 3, 1), [torch.full((1, 3, 4, 4), draw.number)]
        )


@pytest.mark.skipif(
    not os.path.isdir(OPEN_FILES), reason="counts this process's open files as Linux shows them"
)
def test_rows_kept_back_for_packing_hold_no_files_open():
    def draws(start):
        return (SampleIndex(number, 0, number) for number in count(start))

    def assemble(rows):
        return [(one.encoded.input_ids[0], int(one.media[0][0, 0, 0, 0])) for row in rows for one in row]

    stats = DataStats(skip_bad=False, max_bad_share=0, epoch_length=None)
    before = len(os.listdir(OPEN_FILES))
    batches = iter(Batches(draws, Picture(), packed_rows(1, 90), assemble, stats, LoaderConfig(1, workers=1)))
    first = next(batches)
    assert len(first) == 30 and all(token == shown for token, shown in first)
    assert stats.seen > 400  # samples in rows that are still open
    assert len(os.listdir(OPEN_FILES)) - before < 50
    assert all(token == shown for batch in islice(batches, 3) for token, shown in batch)
