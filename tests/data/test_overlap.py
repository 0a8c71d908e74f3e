"""Held-out images that are trained on are found by content, whatever their names, and without reading every file."""

from __future__ import annotations

from flamingo_ft.data import Sample, eval_split
from flamingo_ft.data.eval_split import find_overlap
from flamingo_ft.data.sample import Video


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
