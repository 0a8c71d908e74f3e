"""An atomic write is complete or absent."""

import pytest

from flamingo_ft import atomic


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "notes.txt"
    atomic.write_text(file, "first")
    with pytest.raises(ZeroDivisionError), atomic.file_in_place(file) as hidden:
        hidden.write_text("sec")
        raise ZeroDivisionError
    assert file.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_replaces_the_old_one_only_when_it_is_finished(tmp_path):
    place = tmp_path / "place"
    for content in ("first", "second"):
        (atomic.begin_folder(place) / "file").write_text(content)
        assert not place.exists() if content == "first" else (place / "file").read_text() == "first"
        atomic.finish_folder(place)
        assert (place / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_only_leftovers_are_removed(tmp_path):
    for name in (".step-3.partial", ".step-1.removed", ".step-2.replaced", "step-2"):
        (tmp_path / name / "inside").mkdir(parents=True)
    for name in (".config.json.partial", ".hidden", "notes.partial"):
        (tmp_path / name).write_text("")
    atomic.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes.partial", "step-2"]


def test_a_folder_whose_replacement_never_arrived_is_restored(tmp_path):
    (tmp_path / ".step-2.replaced" / "inside").mkdir(parents=True)
    atomic.remove_leftovers(tmp_path)
    assert (tmp_path / "step-2" / "inside").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_files_are_moved_only_without_an_error_and_other_files_stay(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "record.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.files_in_place(folder, first="record.json") as partial:
        (partial / "record.json").write_text("half")
        raise ZeroDivisionError
    assert (folder / "record.json").read_text() == "old"
    with atomic.files_in_place(folder, first="record.json") as partial:
        for name in ("record.json", "a.txt"):
            (partial / name).write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "notes.txt": "mine",
        "record.json": "new",
        "a.txt": "new",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_cannot_replace_another_leaves_nothing_behind(tmp_path):
    (tmp_path / "place" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        atomic.write_shared(tmp_path / "place", b"content", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    atomic.write_shared(tmp_path / "file", b"content", tmp_path)
    assert (tmp_path / "file").read_bytes() == b"content" and len(list(tmp_path.iterdir())) == 2
