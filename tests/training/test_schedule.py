"""Epochs and warmup ratios are converted to optimizer steps; an extended run equals the longer run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from flamingo_ft.cli import main
from flamingo_ft.config import load_recipe
from flamingo_ft.data import open_data, opened_data
from flamingo_ft.data.opened_data import steps_per_epoch, with_max_steps
from flamingo_ft.errors import UserError
from flamingo_ft.training.build import trainer_arguments
from flamingo_ft.training.optimizer import recompute_learning_rates
from tests import regimes

WEIGHTS = "run/adapter_model.safetensors"
COMMAND = ["train", "./recipe.yaml", "eval.before=false", "train.report_to=[]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe and 10 rows; `more.jsonl` has 4."""
    monkeypatch.chdir(tmp_path)
    regimes.write_run(tmp_path)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows * 5))
    (tmp_path / "more.jsonl").write_text("\n".join(rows * 2))
    return tmp_path


def counted(*overrides: str):
    recipe = regimes.recipe(*overrides)
    return with_max_steps(recipe, open_data(recipe.data, recipe.train.seed)).train


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.epochs=1"], 5),
        (["train.epochs=3", "train.batch_size=4"], 8),  # 30 samples: 7.5 batches
        (["train.epochs=0.1"], 1),
        (["train.epochs=0.01"], 1),
        (["train.epochs=2", "train.gradient_accumulation_steps=5"], 2),
        (["train.epochs=1", "data.train.0.limit=6"], 3),
        (["train.epochs=1", "data.train=[{path: train.jsonl}, {path: more.jsonl}]"], 7),
        (["train.epochs=1", "data.train=[{path: train.jsonl}, {path: more.jsonl, weight: 3}]"], 11),
        (["train.epochs=1", "data.train=[{path: train.jsonl, weight: 0.5}, {path: more.jsonl}]"], 5),
        (["train.max_steps=17"], 17),
    ],
)
def test_an_epoch_has_each_row_once_and_rows_of_weight_w_w_times(folder, overrides, steps):
    train = counted(*overrides)
    assert (train.max_steps, train.epochs) == (steps, None)


def test_an_epoch_excludes_held_out_rows(folder):
    lines = Path("train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"images": [f"{i}.png"]} for i, line in enumerate(lines)]
    for i in range(2, len(rows)):  # rows that share an image stay together: each gets its own
        Path(f"{i}.png").write_bytes(Path(f"{i % 2}.png").read_bytes() + bytes([i]))
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert counted("train.epochs=1", "data.eval_fraction=0.4", "train.batch_size=1").max_steps == 6


def test_decimal_epochs_are_exact(folder):
    """In floating point 1.1 * 10 is 11.000000000000002, which would be rounded up to 12."""
    assert counted("train.epochs=1.1", "train.batch_size=1").max_steps == 11


def test_processes_share_an_epoch(folder, monkeypatch):
    monkeypatch.setattr(opened_data.processes, "world_size", lambda: 5)
    assert counted("train.epochs=1").max_steps == 1


def test_an_epoch_of_packed_data_counts_packed_rows(folder):
    packed = ("data.packing=true", "data.max_text_tokens=64", "train.epochs=1", "train.batch_size=1")
    recipe = regimes.recipe(*packed)
    per_epoch = steps_per_epoch(recipe, open_data(recipe.data, 0))
    assert 1 < per_epoch < 10 and counted(*packed).max_steps == -(-per_epoch // 1)


def test_epochs_work_with_pairs(folder):
    pair = {"prompt": "<image>Which shade?", "chosen": "Dark.", "rejected": "Light.", "images": ["0.png"]}
    Path("pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 3))
    assert counted("train.method=dpo", "data.train=[{path: pairs.jsonl}]", "train.epochs=2").max_steps == 3


def test_warmup_ratio_is_a_fraction_of_all_steps_rounded_up(folder):
    for ratio, steps in ((0.1, 1), (0.5, 4), (0.0, 0)):
        recipe = regimes.recipe("train.max_steps=8", f"train.warmup_ratio={ratio}")
        assert trainer_arguments(recipe).warmup_steps == steps


# --- whole runs ---


def rates(folder: str = "run") -> dict[int, float]:
    entries = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["learning_rate"] for entry in entries if "loss" in entry}


def losses(folder: str = "run") -> list[float]:
    entries = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_an_extended_run_equals_the_longer_run_bit_for_bit(folder, capfd):
    constant = "train.lr_scheduler=constant"
    assert main([*COMMAND, constant, "train.max_steps=10", "train.output_dir=long"]) == 0
    assert main([*COMMAND, constant, "train.epochs=1.2"]) == 0  # 6 steps of 2 samples, of 10 rows
    output = capfd.readouterr().err
    assert "train.epochs: 1.2 x 10 samples are 6 optimizer steps" in output
    recorded = load_recipe("run/resolved_recipe.yaml")
    assert (recorded.train.max_steps, recorded.train.epochs) == (6, None)
    assert json.loads(Path("run/metrics.json").read_text())["train"]["steps"] == 6

    assert main([*COMMAND, constant, "train.epochs=2", "--resume"]) == 0
    output = capfd.readouterr().err
    assert "train.max_steps was 6, is 10: the learning-rate schedule is recomputed for 10 steps" in output
    assert Path(WEIGHTS).read_bytes() == Path("long/adapter_model.safetensors").read_bytes()
    assert losses() == losses("long") and len(losses()) == 10
    assert json.loads(Path("run/metrics.json").read_text())["train"]["steps"] == 10
    assert json.loads(Path("run/metrics.json.step-6").read_text())["train"]["steps"] == 6
    assert load_recipe("run/resolved_recipe.yaml").train.max_steps == 10

    written = Path(WEIGHTS).stat().st_mtime_ns
    assert main([*COMMAND, constant, "train.epochs=2", "--resume"]) == 0  # nothing is left to do
    assert "run: finished after 10 steps" in capfd.readouterr().err
    assert Path(WEIGHTS).stat().st_mtime_ns == written
    assert main([*COMMAND, constant, "train.epochs=1", "--resume"]) == 2
    assert (
        "train.max_steps: got 5" in (output := capfd.readouterr().err)
        and "has trained 10 steps already" in output
    )
    shutil.rmtree("run/checkpoints")
    assert main([*COMMAND, constant, "train.max_steps=12", "--resume"]) == 2
    output = capfd.readouterr().err
    assert "no checkpoint of the finished run in run is left" in output and "model.init_from=run" in output
    assert Path("run/metrics.json").is_file() and Path(WEIGHTS).stat().st_mtime_ns == written


def test_restored_learning_rates_follow_the_runs_schedule_not_the_checkpoints():
    """A linear schedule of 3 steps ends at zero; restored into one of 6, half of the rate is left."""
    parameters = [[torch.nn.Parameter(torch.zeros(1))] for _ in range(2)]
    groups = [{"params": parameters[0], "lr": 0.1}, {"params": parameters[1], "lr": 0.3}]
    short, long = (torch.optim.AdamW([dict(group) for group in groups]) for _ in range(2))
    ended = get_linear_schedule_with_warmup(short, 0, 3)
    for _ in range(3):
        short.step()
        ended.step()
    resumed = get_linear_schedule_with_warmup(long, 0, 6)
    long.load_state_dict(short.state_dict())
    resumed.load_state_dict(ended.state_dict())
    assert [group["lr"] for group in long.param_groups] == [0, 0]
    recompute_learning_rates(resumed)
    assert (
        [group["lr"] for group in long.param_groups] == resumed.get_last_lr() == pytest.approx([0.05, 0.15])
    )


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["false", "true"])
def test_an_extended_run_uses_the_longer_schedule_from_its_first_step(folder, inside):
    """The optimizer was saved with the final learning rates of the shorter schedule, which are zero."""
    linear = (*COMMAND, "train.lr_scheduler=linear", f"train.optimizer_in_backward={inside}")
    assert main([*linear, "train.max_steps=6", "train.output_dir=long"]) == 0
    assert main([*linear, "train.max_steps=3"]) == 0
    assert main([*linear, "train.max_steps=6", "--resume"]) == 0
    extended, longer = rates(), rates("long")
    assert [extended[step] for step in (4, 5, 6)] == pytest.approx(
        [longer[step] for step in (4, 5, 6)], rel=1e-12
    )
    entries = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    by_part = {entry["step"]: entry["learning_rate/perceiver"] for entry in entries if "loss" in entry}
    assert by_part[4] == pytest.approx(longer[4], rel=1e-12) and len(set(losses())) == 6


def test_epochs_are_refused_if_a_source_is_a_stream(folder):
    recipe = regimes.recipe("train.epochs=1")
    data = recipe.data.model_copy(
        update={"train": (recipe.data.train[0].model_copy(update={"streaming": True}),)}
    )
    with pytest.raises(UserError, match="train.epochs: got 1, but a streamed source has no known length"):
        with_max_steps(recipe, open_data(data, 0))
