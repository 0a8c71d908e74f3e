"""A run that is killed, stopped or hindered at any moment goes on as if nothing had been."""

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
    regimes.LORA, "lora.lora_dropout=0.3", "data.eval=[{path: train.jsonl}]", "eval={batch_size: 2, max_new_tokens: 4}",
)  # fmt: skip
WEIGHTS = "run/adapter_model.safetensors"


def command(*more: str) -> list[str]:
    return ["train", "./recipe.yaml", *SETTINGS, *more]


def run_in(folder, *more: str) -> int:
    return killing.wait(killing.start(command(*more), folder, folder / "log.txt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with a run that nobody disturbed, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    regimes.write_run(folder)
    began = time.monotonic()
    assert run_in(folder) == 0, (folder / "log.txt").read_text()
    return folder, time.monotonic() - began


@pytest.fixture
def fresh(uninterrupted, tmp_path):
    """A folder with the same recipe and data."""
    folder = tmp_path / "fresh"
    shutil.copytree(uninterrupted[0], folder, ignore=shutil.ignore_patterns("run", "log.txt"))
    return folder


def finish(folder) -> bytes:
    assert run_in(folder, "--resume") == 0, (folder / "log.txt").read_text()
    return (folder / WEIGHTS).read_bytes()


def test_killed_at_five_random_moments_the_adapter_is_the_same_to_the_last_bit(uninterrupted, fresh):
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
def test_a_signal_saves_and_tells_how_to_go_on(uninterrupted, fresh, number):
    first = killing.file_there(fresh / "run" / "checkpoints", "step-2")
    code = killing.kill_when(killing.start(command(), fresh, fresh / "log.txt"), first, number)
    said = (fresh / "log.txt").read_text()
    assert code == 128 + number, said
    assert f"stopped by {signal.Signals(number).name} after step" in said
    assert "go on with: flamingo-ft train ./recipe.yaml train.max_steps=8" in said and said.strip().endswith(
        "--resume"
    )
    assert not (fresh / WEIGHTS).exists()
    assert finish(fresh) == (uninterrupted[0] / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_leaves_the_workers_to_the_main_one(fresh):
    """As batch systems, systemd and `timeout` send it."""
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
    said = (fresh / "log.txt").read_text()
    assert (
        code == 128 + signal.SIGTERM and "stopped by SIGTERM after step" in said and "Traceback" not in said
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(uninterrupted, fresh):
    second = killing.file_there(fresh / "run" / "checkpoints", "step-4")
    killing.kill_when(killing.start(command(), fresh, fresh / "log.txt"), second)
    newest = max((fresh / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    state = newest / "training" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    weights = finish(fresh)
    said = (fresh / "log.txt").read_text()
    assert f"damaged: {state}".replace(str(fresh) + "/", "") in said and "it was cut off" in said
    assert f"{newest.name}.damaged" in said
    assert weights == (uninterrupted[0] / WEIGHTS).read_bytes()


def test_a_checkpoint_is_an_adapter_like_any_other(uninterrupted):
    newest = uninterrupted[0] / "run" / "checkpoints" / "step-8"
    model, _ = load_adapter(newest)
    final, _ = load_adapter(uninterrupted[0] / "run")
    assert all(a.equal(b) for a, b in zip(model.parameters(), final.parameters(), strict=True))


def test_a_finished_run_is_left_alone(uninterrupted):
    folder, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    assert run_in(folder, "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_a_run_of_another_recipe_is_refused_key_by_key(uninterrupted, capfd):
    folder, _ = uninterrupted
    assert (
        run_in(folder, "--resume", "train.learning_rate=1.0", "lora.language.r=5", "train.save_steps=3") == 2
    )
    said = (folder / "log.txt").read_text()
    assert "train.learning_rate was 0.01, is 1.0" in said and "lora.language.r was 4, is 5" in said
    assert "save_steps" not in said.split("another recipe")[-1]


@pytest.mark.slow
def test_killed_after_its_last_step_a_run_does_not_train_on(uninterrupted, fresh):
    last = killing.file_there(fresh / "run" / "checkpoints", "step-8")
    assert killing.kill_when(killing.start(command(), fresh, fresh / "log.txt"), last) == killing.KILLED
    assert finish(fresh) == (uninterrupted[0] / WEIGHTS).read_bytes()
    assert not (fresh / "run" / "checkpoints" / "step-9").exists()


@pytest.mark.slow
def test_from_a_checkpoint_folder_alone_a_run_goes_on(uninterrupted, fresh):
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
