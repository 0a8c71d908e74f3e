"""Packaged recipes load by name, are copied with their data, and never replace an existing file."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo_ft.config import load_recipe
from flamingo_ft.config.library import copy_recipe, find_recipe, packaged_recipes, summary
from flamingo_ft.errors import UserError

DIGITS = """\
# Teach digits
#
# flamingo-ft train recipes/digits.yaml
model: {vision: {name: nano}, language: {name: nano}}
data: {train: [{path: digits/train.jsonl, image_root: digits}]}
train: {output_dir: runs/digits, max_steps: 2}
"""

USERS_DATA = ("open_flamingo_mimicit",)  # recipes whose data a user has to provide


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library with one recipe and its data; the current directory is another, empty folder."""
    folder = tmp_path / "library"
    (folder / "digits").mkdir(parents=True)
    (folder / "digits.yaml").write_text(DIGITS)
    (folder / "digits" / "train.jsonl").write_text("{}\n")
    monkeypatch.setattr("flamingo_ft.config.library.library_folder", lambda: folder)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def test_a_recipe_is_found_by_its_path_or_its_name(library):
    assert find_recipe("digits") == library / "digits.yaml"
    Path("mine.yaml").write_text(DIGITS)
    assert find_recipe("mine.yaml") == Path("mine.yaml")


def test_a_folder_named_like_a_recipe_does_not_hide_it(library):
    Path("digits").mkdir()
    assert find_recipe("digits") == library / "digits.yaml"


@pytest.mark.parametrize("wrong", ["digts", "recipes/digits.yaml", "digits.yaml"])
def test_a_missing_recipe_is_refused_with_the_nearest_name(library, wrong):
    with pytest.raises(
        UserError, match=f"recipe {wrong}: no such file or packaged recipe; did you mean digits.$"
    ):
        find_recipe(wrong)


def test_a_folder_is_refused_as_a_recipe(library):
    Path("some").mkdir()
    with pytest.raises(UserError, match="a folder, not a recipe file"):
        find_recipe("some")


def test_the_summary_is_the_first_line_of_the_header(library, tmp_path):
    assert summary(find_recipe("digits")) == "Teach digits"
    (tmp_path / "bare.yaml").write_text("model: {}\n# not a header\n")
    assert summary(tmp_path / "bare.yaml") == ""


def test_a_copied_recipe_loads_with_its_copied_data(library):
    copied = copy_recipe("digits", Path("sub/folder"))
    assert copied == [Path("sub/folder/digits.yaml"), Path("sub/folder/digits")]
    recipe = load_recipe(copied[0])
    assert recipe.data.train[0].path == Path.cwd() / "sub/folder/digits/train.jsonl"


@pytest.mark.parametrize("taken", ["digits.yaml", "digits"])
def test_copying_over_anything_is_refused_and_writes_nothing(library, taken):
    Path(taken).write_text("mine")
    with pytest.raises(UserError, match="exists already; choose another folder"):
        copy_recipe("digits", Path("."))
    assert [path.name for path in Path.cwd().iterdir()] == [taken] and Path(taken).read_text() == "mine"


def test_copying_an_unknown_recipe_is_refused_with_the_nearest_name(library):
    with pytest.raises(UserError, match="recipe digit: no packaged recipe of this name; did you mean digits"):
        copy_recipe("digit", Path("."))


def test_data_that_was_copied_with_another_recipe_is_shared(library):
    (library / "more.yaml").write_text(DIGITS)
    copy_recipe("digits", Path("."))
    assert copy_recipe("more", Path(".")) == [Path("more.yaml")]
    Path("digits/train.jsonl").write_text("mine now")
    (library / "third.yaml").write_text(DIGITS)
    with pytest.raises(UserError, match="digits: exists already"):
        copy_recipe("third", Path("."))
    assert Path("digits/train.jsonl").read_text() == "mine now" and not Path("third.yaml").exists()


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_loads_where_it_was_copied_to(name, tmp_path, monkeypatch):
    """Only a run that it starts from and data that a user has to provide are missing, as its header says."""
    monkeypatch.chdir(tmp_path)
    recipe, *_ = copy_recipe(name, Path("copies"))
    for start in ("bridge", "emoji", "siglip2_qwen3_small"):
        Path("runs", start).mkdir(parents=True)
    loaded = load_recipe(recipe, require=("start",) if name in USERS_DATA else ("data", "backbones", "start"))
    for source in (*loaded.data.train, *loaded.data.eval):
        assert source.hub or source.path.is_relative_to(tmp_path / "copies")


def test_every_packaged_recipe_has_a_summary():
    for name, path in packaged_recipes().items():
        assert summary(path), f"{name} has no header"
