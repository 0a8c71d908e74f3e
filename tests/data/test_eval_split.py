"""Evaluation images are not trained on: rows are split by image, and images on both sides are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ft.data import eval_split
from flamingo_ft.data.eval_split import find_overlap, split_eval
from flamingo_ft.data.sample import Sample, Video
from flamingo_ft.errors import UserError
from tests.data.fakes import Numbers


class Shown(Numbers):
    """Rows that show the images listed for them."""

    def __init__(self, images: list[list[str]], bad: frozenset[int] = frozenset()):
        super().__init__(len(images), bad=bad)
        self.images = images

    def sample(self, i: int, raw: int) -> Sample:
        messages = super().sample(i, raw).messages if not self.images[i] else []
        return Sample(messages, self.images[i], "", f"row {i}")


rows_of_images = st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=2), min_size=2, max_size=30)


@given(rows_of_images, st.floats(0.05, 0.9), st.integers(0, 9))
def test_the_two_parts_are_all_rows_and_share_no_image(images, fraction, seed):
    source = Shown(images)
    try:
        ((trained, held),) = split_eval([source], fraction, seed)
    except UserError as error:
        assert "could be held out" in str(error)
        return
    assert sorted([*trained, *held]) == list(range(len(images)))
    assert len(trained) and len(held)
    assert not {i for row in trained for i in images[row]} & {i for row in held for i in images[row]}


@given(rows_of_images, rows_of_images, st.floats(0.05, 0.5), st.integers(0, 9))
def test_an_image_held_out_of_one_source_is_not_trained_on_in_another(first, second, fraction, seed):
    try:
        parts = split_eval([Shown(first), Shown(second)], fraction, seed)
    except UserError as error:
        assert "could be held out" in str(error)
        return
    sides = [set(), set()]
    for images, split in zip((first, second), parts, strict=True):
        assert all(len(rows) for rows in split)
        for side, rows in zip(sides, split, strict=True):
            side |= {image for row in rows for image in images[row]}
    assert not sides[0] & sides[1]


def test_a_large_group_is_not_held_out_where_smaller_ones_do():
    images = [["a.png"]] * 50 + [[f"{i}.png"] for i in range(50)]
    assert all(len(split_eval([Shown(images)], 0.1, seed)[0][1]) == 10 for seed in range(10))


def test_moving_the_folder_of_images_holds_out_the_same_rows():
    here, there = ([[f"{folder}/{i}.png"] for i in range(50)] for folder in ("/here", "/moved/there"))
    assert np.array_equal(split_eval([Shown(here)], 0.2, 0)[0][1], split_eval([Shown(there)], 0.2, 0)[0][1])


def test_the_share_is_that_asked_for_and_another_seed_holds_out_others():
    source = Numbers(1000)
    first, again, other = (split_eval([source], 0.1, seed)[0][1] for seed in (0, 0, 1))
    assert len(first) == 100
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_what_is_held_out_does_not_depend_on_the_order_of_rows():
    images = [[f"{i}.png"] for i in range(40)]
    held = {images[row][0] for row in split_eval([Shown(images)], 0.2, 0)[0][1]}
    turned = images[::-1]
    assert held == {turned[row][0] for row in split_eval([Shown(turned)], 0.2, 0)[0][1]}


def test_rows_that_cannot_be_read_are_left_to_training_which_tells_of_them():
    ((trained, held),) = split_eval([Shown([[f"{i}.png"] for i in range(10)], bad=frozenset({3, 4}))], 0.5, 0)
    assert {3, 4} <= set(trained) and len(held) == 5


def test_rows_that_all_hang_together_cannot_be_held_out():
    with pytest.raises(UserError, match="could be held out .* name a held-out file in data.eval"):
        split_eval([Shown([["a.png"]] * 5)], 0.2, 0)


def samples(folder, contents: dict[str, bytes | None], **wrap) -> list[Sample]:
    """A sample for each image file; None: bytes of the row itself."""
    found = []
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        found.append(Sample([], [str(folder / name)], "t", name))
    return found


def test_copies_under_other_names_are_found_and_the_first_is_named(tmp_path):
    train = samples(tmp_path, {"train/a": b"first", "train/b": b"other", "train/c": b"third!!"})
    held = samples(tmp_path, {"eval/x": b"unlike", "eval/y": b"other", "eval/z": b"first"})
    found = find_overlap(train, held)
    assert (found.count, {(found.eval, found.train)} & {("eval/z", "train/a")}) == (
        2,
        {("eval/z", "train/a")},
    )


def test_nothing_shared_is_nothing(tmp_path):
    assert find_overlap(samples(tmp_path, {"a": b"12345"}), samples(tmp_path, {"b": b"54321"})) is None
    assert find_overlap([], []) is None


def test_bytes_videos_and_frames_count_and_a_sample_counts_once(tmp_path):
    train = [Sample([], [b"pixels", Video(frames=(b"one", b"two")), Video(file=b"film")], "t", "row 1")]
    held = [
        Sample([], [b"two", b"film"], "t", "e1"),
        Sample([], [b"pixels", b"pixels"], "t", "e2"),
        Sample([], [b"new"], "t", "e3"),
    ]
    assert find_overlap(train, held).count == 2


def test_only_files_of_equal_size_are_read(tmp_path, monkeypatch):
    train = samples(tmp_path, {f"train/{n}": b"x" * n for n in range(1, 200)})
    held = samples(tmp_path, {"eval/a": b"y" * 7})
    read = []
    monkeypatch.setattr(eval_split, "read_bytes", lambda image: read.append(image) or b"")
    find_overlap(train, held)
    assert len(read) == 2


def test_urls_and_files_that_are_gone_are_left_out(tmp_path):
    gone = [Sample([], [str(tmp_path / "gone"), "https://example.org/a.png"], "t", "row")]
    assert find_overlap(gone, gone) is None
