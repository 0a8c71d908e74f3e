"""An earlier run is never lost by starting another."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo_ft.config import LOG_FILE, PROBE_FILE, TrainSection
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.training.output_dir import (
    RECIPE_FILE,
    prepare_output_dir,
    refuse_lost_run,
    undo_start,
)


@pytest.fixture
def run(tmp_path):
    """A folder that holds a run."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text("model: {}\n")
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_created_and_an_empty_one_is_used(tmp_path):
    folder = tmp_path / "a" / "b"
    assert prepare_output_dir(folder) is None and folder.is_dir()
    assert prepare_output_dir(folder) is None


def test_a_folder_with_a_run_is_refused_with_all_remedies(run):
    before = contents(run)
    with pytest.raises(
        UserError,
        match=r"already holds a run; resume it with --resume, .* --overwrite, .* train\.output_dir=",
    ):
        prepare_output_dir(run)
    assert contents(run) == before


def test_overwrite_moves_earlier_runs_aside_unchanged(run):
    before = contents(run)
    first = prepare_output_dir(run, overwrite=True)
    assert contents(first) == before and contents(run) == {}
    (run / RECIPE_FILE).write_text("second")
    second = prepare_output_dir(run, overwrite=True)
    assert contents(first) == before and second.name == "one.old-2"


def test_a_run_that_fails_before_its_first_step_gives_the_folder_back(run):
    before = contents(run)
    earlier = prepare_output_dir(run, overwrite=True)
    (run / RECIPE_FILE).write_text("second")
    (run / "checkpoints").mkdir()
    (run / LOG_FILE).write_text("")
    assert undo_start(run, earlier) and contents(run) == before and not earlier.exists()
    earlier = prepare_output_dir(run, overwrite=True)
    (run / LOG_FILE).write_text('{"step": 1, "loss": 2.0}\n')
    assert not undo_start(run, earlier) and contents(earlier) == before


def test_a_checkpoint_is_never_removed_wherever_it_is(run):
    checkpoint = run / "mine" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / ADAPTER_WEIGHTS).write_text("weights")
    before = contents(run)
    assert not undo_start(run, None) and contents(run) == before


def test_a_first_run_that_fails_before_its_first_step_leaves_its_probe_alone(run):
    (run / PROBE_FILE).write_text("{}")
    (run / "figures").mkdir()
    assert undo_start(run, None) and [path.name for path in run.iterdir()] == [PROBE_FILE]
    assert prepare_output_dir(run) is None


def test_a_folder_with_other_files_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files but no run; choose another"):
            prepare_output_dir(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_current_directory_is_never_moved_aside(run, monkeypatch):
    monkeypatch.chdir(run)
    for folder in (Path("."), run, run.parent / ".." / "runs" / "one"):
        with pytest.raises(UserError, match="contains the current directory"):
            prepare_output_dir(folder, overwrite=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file; choose another"):
        prepare_output_dir(tmp_path / "run", overwrite=True)


def test_leftovers_of_a_run_killed_at_its_start_do_not_matter(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".resolved_recipe.yaml.partial").write_text("half")
    assert prepare_output_dir(tmp_path / "run") is None
    (tmp_path / "run" / "checkpoints" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no run"):
        prepare_output_dir(tmp_path / "run", resume=True)


def test_resuming_a_runs_recipe_where_its_folder_is_missing_is_refused(run, tmp_path):
    recipe, elsewhere = run / RECIPE_FILE, tmp_path / "elsewhere"
    with pytest.raises(UserError, match=rf"nothing to resume in {elsewhere}, .* train\.output_dir={run}"):
        refuse_lost_run(recipe, TrainSection(output_dir=elsewhere, max_steps=1))
    refuse_lost_run(recipe, TrainSection(output_dir=run, max_steps=1))
    refuse_lost_run(recipe, TrainSection(output_dir=elsewhere, checkpoint_dir=run, max_steps=1))
    refuse_lost_run(tmp_path / "mine.yaml", TrainSection(output_dir=elsewhere, max_steps=1))
