"""Examples arrive from workers as they were sent, and hold no files open."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from itertools import count, islice

import pytest
import torch
from torch.utils.data import Dataset

from flamingo_ft.data.encode import Encoded
from flamingo_ft.data.features import Frame
from flamingo_ft.data.stream.batches import Batches, LoaderConfig, pack_tensors, packed_rows, unpack_tensors
from flamingo_ft.data.stream.examples import DataStats, Example
from flamingo_ft.data.stream.order import SampleIndex

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
