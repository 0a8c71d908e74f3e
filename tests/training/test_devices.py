"""Several processes train what one process trains with the same samples per step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flamingo_ft.adapters import load_adapter
from flamingo_ft.cli import main
from flamingo_ft.data.examples import total_metrics
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.training.trainer import FlamingoTrainer
from tests.regimes import LORA, NOTHING_WHOLE, write_start
from tests.training.launching import losses, torchrun, train, write_data

MIXED = [[0], [0, 0], [], []] * 2  # some batches of two are plain text
SWAPPABLE = [[0], [0, 0], [], [], [0]] * 2  # four rows have an image that others do not
VIDEOS = [[2], [3], [2], [2]] * 2  # the perceiver runs once for each number of frames in a batch
STEPS = ("train.max_steps=3", "data.eval=[{path: train.jsonl}]")


def assert_same_training(folder, one: str, two: str) -> None:
    assert losses(folder / two) == pytest.approx(losses(folder / one), rel=1e-5)
    first, second = (load_file(folder / run / ADAPTER_WEIGHTS) for run in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # For a gradient near zero, AdamW scales rounding errors up to a fraction of the learning rate, 0.01.
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-3)


def assert_same_evaluation(first: dict, second: dict) -> None:
    """Answers are equal; a loss differs by rounding."""
    gaps = [evaluation.pop("image_loss_gap") for evaluation in (first, second)]
    losses_by_kind = [evaluation.pop("loss_by_kind", {}) for evaluation in (first, second)]
    assert losses_by_kind[0].keys() == losses_by_kind[1].keys()
    for kind, expected in losses_by_kind[0].items():
        assert losses_by_kind[1][kind] == pytest.approx(expected, rel=1e-4)
    assert first == second and gaps[1] == pytest.approx(gaps[0], rel=1e-2, abs=1e-5)


def succeed(*arguments, processes: int = 2) -> str:
    codes, output = train(*arguments, processes=processes)
    assert codes == [0] * processes, output
    return output


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch_size(tmp_path):
    write_data(tmp_path, SWAPPABLE)
    succeed(tmp_path, "one", "train.batch_size=4", *STEPS, processes=1)
    output = succeed(tmp_path, "two", *STEPS)
    assert_same_training(tmp_path, "one", "two")
    first, second = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two"))
    assert_same_evaluation(first["eval"], second["eval"])
    assert first["train"]["data"] == second["train"]["data"]
    assert output.count("adapter in two") == 1 and output.count("rows of format") == 2
    load_adapter(tmp_path / "two")


@pytest.mark.slow
def test_two_processes_equal_one_with_lora_and_accumulation(tmp_path, monkeypatch):
    write_data(tmp_path, MIXED)
    monkeypatch.chdir(tmp_path)
    write_start(tmp_path / "start")
    options = ("train.gradient_accumulation_steps=2", NOTHING_WHOLE, LORA, "model.init_from=start", *STEPS)
    succeed(tmp_path, "one", "train.batch_size=4", *options, processes=1)
    succeed(tmp_path, "two", *options)
    assert_same_training(tmp_path, "one", "two")


SHARDED = {
    "bridge and LoRA, checkpointed, accumulated, tiles": (
        LORA, "train.gradient_checkpointing=true", "train.gradient_accumulation_steps=2",
        "data.tiles={max: 4}",
    ),
    "nf4, text tags without a perceiver": (
        "model.language.quantization=nf4", "model.vision.quantization=nf4",
        "model.perceiver=null", "data.tiles={max: 4, tags: text}",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_a_sharded_run_equals_an_unsharded_one_and_resumes_bit_for_bit(tmp_path, case):
    write_data(tmp_path, SWAPPABLE)
    options = (
        "train.optimizer=adamw",
        "train.save_steps=2",
        "eval={steps: 2, keep: best, batch_size: 2, max_new_tokens: 4}",
        *STEPS,
        *SHARDED[case],
    )
    succeed(tmp_path, "one", "train.batch_size=4", *options, processes=1)
    succeed(tmp_path, "two", "train.fsdp=true", *options)
    assert_same_training(tmp_path, "one", "two")
    first, second = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two"))
    assert_same_evaluation(first["eval"], second["eval"])
    assert first["train"]["best"]["step"] == second["train"]["best"]["step"]
    weights = (tmp_path / "two" / ADAPTER_WEIGHTS).read_bytes()
    for name in ("metrics.json", ADAPTER_WEIGHTS):
        (tmp_path / "two" / name).unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-3")
    succeed(tmp_path, "two", "train.fsdp=true", *options, "--resume")
    assert (tmp_path / "two" / ADAPTER_WEIGHTS).read_bytes() == weights


@pytest.mark.slow
def test_two_processes_equal_one_when_their_videos_differ_in_length(tmp_path):
    write_data(tmp_path, VIDEOS)
    succeed(tmp_path, "one", "train.batch_size=4", "train.max_steps=3", processes=1)
    succeed(tmp_path, "two", "train.max_steps=3")
    assert_same_training(tmp_path, "one", "two")


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path):
    write_data(tmp_path, MIXED)
    succeed(tmp_path, "whole", "train.max_steps=4", "train.save_steps=2")
    succeed(tmp_path, "again", "train.max_steps=4", "train.save_steps=2")
    (tmp_path / "again" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-4")
    succeed(tmp_path, "again", "train.max_steps=4", "train.save_steps=2", "--resume")
    first, second = ((tmp_path / run / ADAPTER_WEIGHTS).read_bytes() for run in ("whole", "again"))
    assert first == second


@pytest.mark.slow
def test_an_error_in_one_process_is_printed_once_and_ends_all(tmp_path):
    rows = write_data(tmp_path, MIXED)
    rows[5]["images"][0] = "missing.png"
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = torchrun(tmp_path, "two", "train.max_steps=8")
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == 1 and "row 5: images[0]: no such image" in errors[0]
    assert "exitcode  : 2" in done.stderr


def fail_to_load_in_rank_1() -> None:
    def fail(*_):
        if os.environ.get("RANK") == "1":
            raise UserError("cannot be loaded here")

    Predictor.encode = fail


@pytest.mark.slow
def test_a_loading_error_in_one_process_ends_a_sharded_run(tmp_path):
    write_data(tmp_path, MIXED)
    codes, output = train(tmp_path, "two", "train.fsdp=true", *STEPS, spoil=fail_to_load_in_rank_1)
    assert codes == [2, 2], output
    assert output.count("error: process 1: cannot be loaded here") == 1


def feed_nan_in_rank_1() -> None:
    training_step = FlamingoTrainer.training_step

    def spoil(trainer, model, inputs, *arguments, **options):
        if os.environ.get("RANK") == "1":
            inputs["pixel_values"].fill_(float("nan"))
            Path("spoiled.json").write_text(json.dumps(trainer.pending[0].rows))
        return training_step(trainer, model, inputs, *arguments, **options)

    FlamingoTrainer.training_step = spoil


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_non_finite_inputs_in_one_process_are_reported_with_its_samples(tmp_path, sharded):
    rows = write_data(tmp_path, [[0]] * 8)
    options = (f"train.fsdp={sharded}", "train.max_steps=1", "eval.before=false")
    codes, output = train(tmp_path, "two", *options, spoil=feed_nan_in_rank_1)
    assert codes == [2, 2], output
    spoiled = json.loads((tmp_path / "spoiled.json").read_text())
    assert 0 < len(spoiled) < len(rows)
    assert f"trained on {', '.join(spoiled)}: pixel_values of the batch is not finite" in output


def test_accelerates_own_fsdp_is_refused(tmp_path, monkeypatch, capsys):
    write_data(tmp_path, MIXED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "./recipe.yaml"]) == 2
    assert "set train.fsdp to true" in capsys.readouterr().err


def test_data_counts_are_summed_over_processes():
    first = {"rows": 3, "skipped": 1, "dropped": 0, "shortened": {"samples": 1}}
    second = {"rows": 4, "skipped": 0, "dropped": 2, "shortened": {"turns": 2}}
    total = {"rows": 7, "skipped": 1, "dropped": 2, "shortened": {"samples": 1, "turns": 2}}
    assert total_metrics([first, second]) == total


def test_two_gpus_in_one_process_are_refused_before_loading(tmp_path, monkeypatch, capsys):
    write_data(tmp_path, MIXED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("flamingo_ft.training.train.open_data", None)
    assert main(["train", "./recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert "CUDA_VISIBLE_DEVICES=0" in error and "torchrun --nproc-per-node 2 -m flamingo_ft train" in error
