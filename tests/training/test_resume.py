"""A run that is killed or stopped at any moment resumes bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest

from flamingo_ft.adapters import load_adapter
from tests import killing, regimes

SETTINGS = (
    "train.max_steps=8", "train.save_steps=2", "train.gradient_accumulation_steps=2", "train.warmup_steps=2",
    regimes.LORA, "lora.lora_dropout=0.3", "data.eval=[{path: train.jsonl}]",
    "eval={batch_size: 2, max_new_tokens: 4}",
)  # fmt: skip
WEIGHTS = "run/adapter_model.safetensors"


def command(*more: str) -> list[str]:
    return ["train", "./recipe.yaml", *SETTINGS, *more]


def run_in(folder, *more: str) -> int:
    return killing.wait(killing.start(command(*more), folder, folder / "log.txt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with an undisturbed run, and its duration in seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    regimes.write_run(folder)
    began = time.monotonic()
    assert run_in(folder) == 0, (folder / "log.txt").read_text()
    return folder, time.monotonic() - began


@pytest.fixture
def fresh(uninterrupted, tmp_path):
    """A folder with the same recipe and data, and no run."""
    folder = tmp_path / "fresh"
    shutil.copytree(uninterrupted[0], folder, ignore=shutil.ignore_patterns("run", "log.txt"))
    return folder


def finish(folder) -> bytes:
    assert run_in(folder, "--resume") == 0, (folder / "log.txt").read_text()
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_resume_after_sigkill_at_any_moment_is_bit_identical(uninterrupted, fresh):
    """At random ones, and while a checkpoint is being written."""
    whole, seconds = uninterrupted
    dice = random.Random(time.time_ns())
    moments = [seconds * dice.uniform(0.2, 0.9) for _ in range(4)]
    codes = []
    for moment in moments:
        process = killing.start(command("--resume"), fresh, fresh / "log.txt")
        codes.append(killing.kill_when(process, killing.after(moment)))
    half_written = killing.file_there(fresh / "run" / "checkpoints", ".step-*.partial")
    codes.append(
        killing.kill_when(killing.start(command("--resume"), fresh, fresh / "log.txt"), half_written)
    )
    assert set(codes) <= {0, killing.KILLED}, (moments, codes, (fresh / "log.txt").read_text())
    assert finish(fresh) == (whole / WEIGHTS).read_bytes(), moments


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_resume(uninterrupted, fresh, number):
    first = killing.file_there(fresh / "run" / "checkpoints", "step-2")
    code = killing.kill_when(killing.start(command(), fresh, fresh / "log.txt"), first, number)
    output = (fresh / "log.txt").read_text()
    assert code == 128 + number, output
    assert f"stopped by {signal.Signals(number).name} after step" in output
    assert (
        "resume with: flamingo-ft train ./recipe.yaml train.max_steps=8" in output
        and output.strip().endswith("--resume")
    )
    assert not (fresh / WEIGHTS).exists()
    assert finish(fresh) == (uninterrupted[0] / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_does_not_kill_workers_early(fresh):
    """As batch systems, systemd and `timeout` do."""
    arguments = [
        "train",
        "./recipe.yaml",
        "train.max_steps=4000",
        "train.num_workers=2",
        "train.save_steps=2",
    ]
    process = killing.start(arguments, fresh, fresh / "log.txt")
    there = killing.file_there(fresh / "run" / "checkpoints", "step-4")
    code = killing.kill_when(process, there, signal.SIGTERM, send=os.killpg)
    output = (fresh / "log.txt").read_text()
    assert (
        code == 128 + signal.SIGTERM
        and "stopped by SIGTERM after step" in output
        and "Traceback" not in output
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(uninterrupted, fresh):
    second = killing.file_there(fresh / "run" / "checkpoints", "step-4")
    killing.kill_when(killing.start(command(), fresh, fresh / "log.txt"), second)
    newest = max((fresh / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    state = newest / "training" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    weights = finish(fresh)
    output = (fresh / "log.txt").read_text()
    assert f"damaged: {state}".replace(str(fresh) + "/", "") in output and "the file is truncated" in output
    assert f"{newest.name}.damaged" in output
    assert weights == (uninterrupted[0] / WEIGHTS).read_bytes()


def test_a_checkpoint_loads_as_an_adapter(uninterrupted):
    newest = uninterrupted[0] / "run" / "checkpoints" / "step-8"
    model, _ = load_adapter(newest)
    final, _ = load_adapter(uninterrupted[0] / "run")
    assert all(a.equal(b) for a, b in zip(model.parameters(), final.parameters(), strict=True))


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    folder, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    assert run_in(folder, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_resuming_with_another_recipe_is_refused_key_by_key(uninterrupted, capfd):
    folder, _ = uninterrupted
    assert (
        run_in(folder, "--resume", "train.learning_rate=1.0", "lora.language.r=5", "train.save_steps=3") == 2
    )
    output = (folder / "log.txt").read_text()
    assert "train.learning_rate was 0.01, is 1.0" in output and "lora.language.r was 4, is 5" in output
    assert "save_steps" not in output.split("another recipe")[-1]


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_trains_no_further(uninterrupted, fresh):
    last = killing.file_there(fresh / "run" / "checkpoints", "step-8")
    assert killing.kill_when(killing.start(command(), fresh, fresh / "log.txt"), last) == killing.KILLED
    assert finish(fresh) == (uninterrupted[0] / WEIGHTS).read_bytes()
    assert not (fresh / "run" / "checkpoints" / "step-9").exists()


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoint_folder_alone(uninterrupted, fresh):
    drive = fresh / "drive"
    where = f"train.checkpoint_dir={drive}"
    code = killing.kill_when(
        killing.start(command(where), fresh, fresh / "log.txt"), killing.file_there(drive, "step-4")
    )
    assert code == killing.KILLED
    shutil.rmtree(fresh / "run")
    assert run_in(fresh, where, "--resume") == 0, (fresh / "log.txt").read_text()
    assert (fresh / WEIGHTS).read_bytes() == (uninterrupted[0] / WEIGHTS).read_bytes()
    assert '"before"' in (fresh / "run" / "predictions.jsonl").read_text()
