"""Disk failures and missing data: a one-line error, and the last valid checkpoint intact."""

from __future__ import annotations

import errno
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from flamingo_ft import atomic
from flamingo_ft.cli import main
from flamingo_ft.errors import UserError
from flamingo_ft.training.checkpoint_folders import (
    FORMAT,
    MANIFEST,
    latest_valid,
    list_checkpoints,
    verify,
    write_manifest,
)
from tests import killing, regimes

COMMAND = ["train", "./recipe.yaml", "train.max_steps=6", "train.save_steps=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    regimes.write_run(tmp_path)
    return tmp_path


def failing_output(capfd, *more: str) -> str:
    """Run the command, which must fail without a traceback, and return its error lines."""
    assert main([*COMMAND, *more]) == 2
    output = capfd.readouterr().err
    assert "Traceback" not in output
    return "".join(line for line in output.splitlines(keepends=True) if line.startswith("error: "))


def finish(folder) -> bytes:
    assert main([*COMMAND, "--resume"]) == 0
    return (folder / "run" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Adapter weights of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    regimes.write_run(folder)
    assert killing.wait(killing.start(COMMAND, folder, folder / "log.txt")) == 0
    return (folder / "run" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_full_disk_during_a_save_keeps_the_previous_checkpoint(folder, monkeypatch, capfd, weights):
    def full_at_step_4(path):
        if ".step-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync", full_at_step_4)
        output = failing_output(capfd)
    assert (
        "run/checkpoints/step-4: cannot write this checkpoint" in output
        and "No space left on device" in output
    )
    assert "the last checkpoint is run/checkpoints/step-2" in output and "--resume" in output
    assert list(list_checkpoints(folder / "run" / "checkpoints")) == [2]
    verify(folder / "run" / "checkpoints" / "step-2")
    assert finish(folder) == weights


@pytest.mark.slow
def test_a_file_size_limit_is_reported_in_one_line(folder):
    process = killing.start(COMMAND, folder, folder / "log.txt", killing.Around(file_limit=200_000))
    assert killing.wait(process) == 2
    output = (folder / "log.txt").read_text()
    assert (
        "step-2: cannot write this checkpoint" in output
        and "the run has no earlier checkpoint" in output
        and "Traceback" not in output
    )


def test_an_unwritable_checkpoint_folder_is_refused_before_loading(folder, monkeypatch, capfd):
    monkeypatch.setattr("flamingo_ft.training.train.open_data", None)
    output = failing_output(capfd, "train.checkpoint_dir=/proc/checkpoints")
    assert "train.checkpoint_dir: cannot write checkpoints to /proc/checkpoints" in output


def stopped_after_step_2(folder) -> None:
    there = killing.file_there(folder / "run" / "checkpoints", "step-2")
    process = killing.start(COMMAND, folder, folder / "log.txt")
    assert killing.kill_when(process, there, signal.SIGTERM) == 128 + signal.SIGTERM, (
        folder / "log.txt"
    ).read_text()


@pytest.mark.slow
def test_a_missing_data_file_is_reported_and_the_run_resumes_once_it_is_back(folder, capfd, weights):
    stopped_after_step_2(folder)
    rows = folder / "train.jsonl"
    rows.rename(folder / "elsewhere.jsonl")
    assert f"no file {rows}" in failing_output(capfd, "--resume")
    (folder / "elsewhere.jsonl").rename(rows)
    assert finish(folder) == weights


def lose(path) -> bool:
    path.rename(path.with_name("elsewhere"))
    return True


@pytest.mark.slow
def test_an_image_deleted_during_training_ends_the_run_with_its_name(folder):
    arguments = [*COMMAND, "train.max_steps=400", "train.save_steps=2", "train.lr_scheduler=constant"]
    process = killing.start(arguments, folder, folder / "log.txt")
    there = killing.file_there(folder / "run" / "checkpoints", "step-2")
    assert killing.kill_when(process, lambda: there() and lose(folder / "0.png"), number=0) == 2
    output = (folder / "log.txt").read_text()
    assert "train.jsonl: row 0" in output and "0.png" in output and "Traceback" not in output
    assert "the last checkpoint; fix the problem, and resume from there with --resume" in output


@pytest.mark.slow
def test_resuming_with_other_rows_is_refused(folder, capfd):
    stopped_after_step_2(folder)
    first, second = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([first, second, json.dumps(json.loads(first))]))
    assert "train.jsonl had 2 rows when this checkpoint was written, got 3" in failing_output(
        capfd, "--resume"
    )


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_reported_with_the_last_checkpoint(folder, monkeypatch, capfd, weights):
    def full(*_, **__):
        raise SafetensorError("No space left on device")  # safetensors raises no OSError

    with monkeypatch.context() as patch:
        patch.setattr("flamingo_ft.training.train.save_adapter", full)
        output = failing_output(capfd)
    assert "run: cannot write (No space left on device)" in output
    assert "resume from run/checkpoints/step-6 with --resume" in output
    assert finish(folder) == weights


@pytest.mark.slow
def test_a_killed_worker_is_reported_in_one_line(folder):
    arguments = [*COMMAND, "train.max_steps=4000", "train.num_workers=2"]
    process = killing.start(arguments, folder, folder / "log.txt")
    there = killing.file_there(folder / "run" / "checkpoints", "step-2")

    def kill_a_worker(main_process, number):
        children = Path(f"/proc/{main_process}/task/{main_process}/children").read_text().split()
        os.kill(int(children[-1]), number)

    assert killing.kill_when(process, there, send=kill_a_worker) == 2
    output = (folder / "log.txt").read_text()
    assert "train.num_workers: a data-loading worker died" in output and "Traceback" not in output


def test_a_new_run_is_refused_beside_the_checkpoints_of_another(folder, capfd):
    """They have the higher steps, so the new run's own would be pruned at once."""
    assert main([*COMMAND, "train.checkpoint_dir=drive"]) == 0
    output = failing_output(capfd, "train.checkpoint_dir=drive", "train.output_dir=second")
    assert "train.checkpoint_dir: drive holds step-6 of an earlier run" in output and not list(
        (folder / "second").iterdir()
    )


def test_every_change_of_a_manifest_is_noticed(tmp_path):
    (tmp_path / "weights").write_bytes(b"content")
    write_manifest(
        tmp_path, {"step": 12, "processes": 1, "seconds": 3.5, "ended": False, "sources": {"a": 2}}
    )
    manifest = tmp_path / MANIFEST
    record, written = verify(tmp_path), manifest.read_bytes()
    for place in range(len(written)):
        for changed in (
            written[:place],
            written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :],
        ):
            manifest.write_bytes(changed)
            with suppress(UserError):
                assert verify(tmp_path) == record


def test_a_checkpoint_of_a_later_version_does_not_count_as_damaged(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        write_manifest(tmp_path / f"step-{step}", {"step": step})
    manifest = tmp_path / "step-2" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="upgrade flamingo_ft"):
        latest_valid(tmp_path)
    manifest.write_text("{")
    assert latest_valid(tmp_path)[0] == tmp_path / "step-1"


@pytest.mark.parametrize(
    "error", [RuntimeError("2 trained parameters would not be saved"), RuntimeError("NCCL error: unhandled")]
)
def test_other_failures_while_saving_are_not_reported_as_a_full_disk(folder, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("flamingo_ft.training.checkpoints.save_adapter", fails)
    with pytest.raises(RuntimeError, match=str(error)):
        main([*COMMAND, "train.max_steps=1"])
