"""Data named beside an adapter is read with the columns that the run's recipe names."""

from pathlib import Path

import pytest

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data.read_like import read_like, recorded_sources
from flamingo_ft.data.sources.source import open_source
from flamingo_ft.errors import UserError
from flamingo_ft.inference.prompts_of_data import Rows
from tests.data.fixtures import SCANS

COLUMNS = {"question": "ask", "answer": "reply", "image": "picture"}


def write(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def known(tmp_path) -> DataSource:
    file = write(tmp_path / "train.csv", "picture,ask,reply", "0690.png,Which?,Eight.")
    return DataSource(path=file, format="vqa", columns=COLUMNS, image_root=SCANS, limit=1, weight=2.0)


def source_of(path: Path, *known: DataSource) -> DataSource:
    return read_like(path, known, lambda one: open_source(one, DataSection(train=(one,))))


def test_a_recipes_own_file_is_read_whole_with_its_settings(known):
    source = source_of(known.path, known)
    assert (source.columns, source.image_root) == (COLUMNS, SCANS)
    assert (source.limit, source.weight) == (None, 1.0)


def test_another_file_with_these_columns_gets_them_and_one_that_is_recognized_does_not(known, tmp_path):
    alike = write(tmp_path / "held.csv", "picture,ask,reply", "0945.png,Which?,Nine.")
    assert source_of(alike, known).columns == COLUMNS
    usual = write(tmp_path / "usual.csv", "image,question,answer", f"{SCANS}/0945.png,Which?,Nine.")
    assert source_of(usual, known).columns == {}


def test_optional_columns_of_the_run_may_be_missing(known, tmp_path):
    known = known.model_copy(update={"columns": COLUMNS | {"task": "kind", "boxes": "corners"}})
    asked = write(tmp_path / "asked.csv", "picture,ask", "0945.png,Which?")
    (row,) = Rows(asked, known=[known])
    assert row.error is None and row.prompt.messages[-1]["content"][-1]["text"] == "Which?"
    held_out = write(tmp_path / "held.csv", "picture,ask,reply", "0945.png,Which?,Nine.")
    assert source_of(held_out, known).columns == COLUMNS
    tasks = write(tmp_path / "tasks.csv", "picture,ask,reply,Kind", "0945.png,Which?,Nine.,odd")
    assert source_of(tasks, known).columns == COLUMNS | {"task": "kind"}


def test_a_file_gets_the_columns_of_any_source_of_the_run_that_has_them(known, tmp_path):
    other = DataSource(path=tmp_path / "pairs.jsonl", columns={"images": "pics", "question": "riddle"})
    alike = write(tmp_path / "held.csv", "picture,ask,reply", "0945.png,Which?,Nine.")
    assert source_of(alike, other, known).columns == COLUMNS


def test_a_file_without_these_columns_is_refused_with_a_remedy_that_needs_no_recipe(known, tmp_path):
    other = write(tmp_path / "other.csv", "picture,group", "0945.png,odd")
    refusal = r"row 0: no format has these columns, got picture, group; rename them to "
    usual = r"those of a format, such as image, question and answer \(README.md, Your data\)$"
    of_run = r"the columns of the run's data \(ask, reply, picture\), or to "
    for read in (source_of, lambda path, *known: Rows(path, known=known)):
        with pytest.raises(UserError, match=refusal + of_run + usual):
            read(other, known)
        with pytest.raises(UserError, match=refusal + usual):
            read(other)


def test_images_that_are_not_beside_a_file_are_looked_up_where_the_runs_are(known, tmp_path):
    alike = write(tmp_path / "held.csv", "picture,ask,reply", "0945.png,Which?,Nine.")
    usual = write(tmp_path / "usual.csv", "image,question,answer", "0945.png,Which?,Nine.")
    assert source_of(alike, known).image_root == source_of(usual, known).image_root == SCANS
    beside = write(tmp_path / "beside.csv", "picture,ask,reply", "mine.png,Which?,Nine.")
    (tmp_path / "mine.png").write_bytes((SCANS / "0945.png").read_bytes())
    assert source_of(beside, known).image_root is None
    nowhere = write(tmp_path / "nowhere.csv", "picture,ask,reply", "gone.png,Which?,Nine.")
    assert source_of(nowhere, known).image_root is None


def test_rows_to_answer_are_read_like_the_run_too(known, tmp_path):
    alike = write(tmp_path / "new.csv", "picture,ask,reply", "0945.png,Which?,Nine.")
    (row,) = Rows(alike, known=[known])
    assert row.error is None and row.reference == "Nine."
    assert row.prompt.messages[-1]["content"][-1]["text"] == "Which?"
    unanswered = write(tmp_path / "asked.csv", "picture,ask", "0945.png,Which?")
    (row,) = Rows(unanswered, image_root=SCANS, known=[known])
    assert row.error is row.reference is None
    assert row.prompt.messages[-1]["content"][-1]["text"] == "Which?"


def test_a_recipe_of_another_version_or_none_names_no_sources(tmp_path):
    unreadable = tmp_path / "resolved_recipe.yaml"
    assert recorded_sources(unreadable) == ()
    unreadable.write_text("a_key_of_later_versions: 1\n")
    assert recorded_sources(unreadable) == ()
