"""Media of all samples in one tensor, each where it belongs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ft.data.collate import stack_media

lengths = st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=4)


@given(lengths)
def test_every_medium_is_found_again_and_the_rest_is_zero(lengths):
    rows = [[torch.randn(frames, 3, 2, 2) for frames in row] for row in lengths]
    batch = stack_media(rows)
    if not any(rows):
        assert batch == {}
        return
    pixels = batch["pixel_values"]
    pixels = pixels[:, :, None] if pixels.dim() == 5 else pixels
    frames = {len(medium) for row in rows for medium in row}
    assert ("frame_counts" in batch) == (len(frames) > 1)
    total = 0.0
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            assert torch.equal(pixels[b, m, : len(medium)], medium)
            assert len(frames) == 1 or batch["frame_counts"][b, m] == len(medium)
            total += float(medium.abs().sum())
    torch.testing.assert_close(float(pixels.abs().sum()), total, rtol=1e-4, atol=1e-4)


def test_single_images_have_no_axis_of_frames():
    assert stack_media([[torch.zeros(1, 3, 4, 4)], []])["pixel_values"].shape == (2, 1, 3, 4, 4)
