"""Evaluation images are not trained on: rows are split by image, and images on both sides are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ft.data import eval_split
from flamingo_ft.data.eval_split import find_overlap, split_eval
from flamingo_ft.data.media import read_bytes
from flamingo_ft.data.sample import Sample, Video
from flamingo_ft.errors import UserError
from tests.data.fakes import Numbers


class ImageRows(Numbers):
    """Rows with the images listed for them."""

    def __init__(self, images: list[list[str]], bad: frozenset[int] = frozenset()):
        super().__init__(len(images), bad=bad)
        self.images = images

    def sample(self, i: int, raw: int) -> Sample:
        messages = super().sample(i, raw).messages if not self.images[i] else []
        return Sample(messages, self.images[i], "", f"row {i}")


rows_of_images = st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=2), min_size=2, max_size=30)


@given(rows_of_images, st.floats(0.05, 0.9), st.integers(0, 9))
def test_the_split_covers_all_rows_and_shares_no_image(images, fraction, seed):
    source = ImageRows(images)
    try:
        ((train, evaluated),) = split_eval([source], fraction, seed)
    except UserError as error:
        assert "could be held out" in str(error)
        return
    assert sorted([*train, *evaluated]) == list(range(len(images)))
    assert len(train) and len(evaluated)
    assert not {i for row in train for i in images[row]} & {i for row in evaluated for i in images[row]}


@given(rows_of_images, rows_of_images, st.floats(0.05, 0.5), st.integers(0, 9))
def test_an_eval_image_of_one_source_is_not_trained_on_in_another(first, second, fraction, seed):
    try:
        parts = split_eval([ImageRows(first), ImageRows(second)], fraction, seed)
    except UserError as error:
        assert "could be held out" in str(error)
        return
    sides = [set(), set()]
    for images, split in zip((first, second), parts, strict=True):
        assert all(len(rows) for rows in split)
        for side, rows in zip(sides, split, strict=True):
            side |= {image for row in rows for image in images[row]}
    assert not sides[0] & sides[1]


def test_copies_of_an_image_file_stay_on_one_side(tmp_path):
    drawings = {f"{number}": f"picture {number}".encode() for number in range(10, 30)}
    copies = {f"copy of {name}": content for name, content in drawings.items()}
    images = [sample.images for sample in samples(tmp_path, {**drawings, **copies})]
    for seed in range(5):
        ((train, evaluated),) = split_eval([ImageRows(images)], 0.2, seed)
        contents = [[read_bytes(images[row][0]) for row in side] for side in (train, evaluated)]
        assert len(evaluated) == 8 and not {*contents[0]} & {*contents[1]}


def test_a_large_group_is_not_held_out_if_smaller_groups_suffice():
    images = [["a.png"]] * 50 + [[f"{i}.png"] for i in range(50)]
    assert all(len(split_eval([ImageRows(images)], 0.1, seed)[0][1]) == 10 for seed in range(10))


def test_moving_the_image_folder_does_not_change_the_split():
    here, there = ([[f"{folder}/{i}.png"] for i in range(50)] for folder in ("/here", "/moved/there"))
    assert np.array_equal(
        split_eval([ImageRows(here)], 0.2, 0)[0][1], split_eval([ImageRows(there)], 0.2, 0)[0][1]
    )


def test_the_split_has_the_requested_fraction_and_follows_the_seed():
    source = Numbers(1000)
    first, again, other = (split_eval([source], 0.1, seed)[0][1] for seed in (0, 0, 1))
    assert len(first) == 100
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_split_does_not_depend_on_the_order_of_rows():
    images = [[f"{i}.png"] for i in range(40)]
    expected = {images[row][0] for row in split_eval([ImageRows(images)], 0.2, 0)[0][1]}
    reversed_images = images[::-1]
    rows = split_eval([ImageRows(reversed_images)], 0.2, 0)[0][1]
    assert {reversed_images[row][0] for row in rows} == expected


def test_unreadable_rows_stay_in_training():
    source = ImageRows([[f"{i}.png"] for i in range(10)], bad=frozenset({3, 4}))
    ((train, evaluated),) = split_eval([source], 0.5, 0)
    assert {3, 4} <= set(train) and len(evaluated) == 5


def test_a_source_whose_rows_all_share_an_image_cannot_be_split():
    with pytest.raises(UserError, match="could be held out .* name a held-out file in data.eval"):
        split_eval([ImageRows([["a.png"]] * 5)], 0.2, 0)


def samples(folder, contents: dict[str, bytes]) -> list[Sample]:
    """Write image files, and return a sample for each."""
    result = []
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        result.append(Sample([], [str(folder / name)], "t", name))
    return result


def test_copied_files_under_other_names_overlap(tmp_path):
    train = samples(tmp_path, {"train/a": b"first", "train/b": b"other", "train/c": b"third!!"})
    evaluated = samples(tmp_path, {"eval/x": b"unlike", "eval/y": b"other", "eval/z": b"first"})
    overlap = find_overlap(train, evaluated)
    assert (overlap.count, overlap.eval, overlap.train) == (2, "eval/z", "train/a")


def test_different_images_do_not_overlap(tmp_path):
    assert find_overlap(samples(tmp_path, {"a": b"12345"}), samples(tmp_path, {"b": b"54321"})) is None
    assert find_overlap([], []) is None


def test_bytes_videos_and_frames_are_compared_and_a_sample_counts_once(tmp_path):
    train = [Sample([], [b"pixels", Video(frames=(b"one", b"two")), Video(file=b"film")], "t", "row 1")]
    evaluated = [
        Sample([], [b"two", b"film"], "t", "e1"),
        Sample([], [b"pixels", b"pixels"], "t", "e2"),
        Sample([], [b"new"], "t", "e3"),
    ]
    assert find_overlap(train, evaluated).count == 2


def test_only_files_of_equal_size_are_read(tmp_path, monkeypatch):
    train = samples(tmp_path, {f"train/{n}": b"x" * n for n in range(1, 200)})
    evaluated = samples(tmp_path, {"eval/a": b"y" * 7})
    read = []
    monkeypatch.setattr(eval_split, "read_bytes", lambda image: read.append(image) or b"")
    find_overlap(train, evaluated)
    assert len(read) == 2


def test_urls_and_missing_files_are_ignored(tmp_path):
    missing = [Sample([], [str(tmp_path / "gone"), "https://example.org/a.png"], "t", "row")]
    assert find_overlap(missing, missing) is None
