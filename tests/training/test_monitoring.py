"""Monitoring a run: log, throughput, gates, learning rates, trackers, progress bars."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from flamingo_ft import progress as progress_module
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import ACCURACY
from flamingo_ft.progress import LINE_SECONDS, progress_bars
from flamingo_ft.report import LiveReport
from flamingo_ft.report.run_folder import LogFile, read_log, write_log
from flamingo_ft.training import monitoring
from flamingo_ft.training.monitoring import ProgressBar, check_trackers, tracker_callbacks
from flamingo_ft.training.train import train

from ..regimes import recipe, write_run

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run over four steps."""
    folder = tmp_path_factory.mktemp("monitored")
    write_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(recipe(f"train.max_steps={STEPS}", "eval.before=false"))
    return folder / "run"


def training_entries(run) -> list[dict]:
    return [entry for entry in read_log(run) if "loss" in entry]


def test_log_entries_have_throughput_memory_and_gradient_norm_as_numbers(run):
    entries = training_entries(run)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    for entry in entries:
        assert all(isinstance(value, int | float) for value in entry.values())
        assert entry["memory_gib"] > 0 and entry["grad_norm"] > 0
        assert entry["images_per_second"] == pytest.approx(
            entry["samples_per_second"]
        )  # one image per sample
        assert entry["label_tokens_per_second"] > entry["samples_per_second"] > 0
    assert [entry["seconds"] for entry in entries] == sorted(entry["seconds"] for entry in entries)


def test_gates_are_logged_by_decoder_layer(run):
    model = SimpleNamespace()
    block = SimpleNamespace(attn_gate=torch.tensor([0.5]), ff_gate=torch.tensor([-2.0]))
    model.gated_cross_attn_layers = [None, block, None]
    assert monitoring.gate_values(model) == pytest.approx(
        {"gate/attention/1": math.tanh(0.5), "gate/feed_forward/1": math.tanh(-2.0)}
    )
    first, *_, last = training_entries(run)
    assert abs(last["gate/attention/0"]) > 0 and last["gate/attention/0"] != first["gate/attention/0"]


def test_learning_rates_are_logged_by_part():
    groups = [{"name": "perceiver", "initial_lr": 1e-3}, {"name": "lora", "initial_lr": 2e-4}]
    rates = monitoring.learning_rates(SimpleNamespace(param_groups=groups), 5e-4)
    assert rates == pytest.approx({"learning_rate/perceiver": 5e-4, "learning_rate/lora": 1e-4})
    assert monitoring.learning_rates(SimpleNamespace(param_groups=[{"lr": 1.0}]), 0.5) == {}


def test_throughput_excludes_pauses_and_restarts_after_each_reading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock, counts = monitoring.ThroughputMeter(), Counter(samples=8, images=16, label_tokens=80)
    now[0] = 2.0
    with clock.paused():
        now[0] = 50.0
        with clock.paused():
            now[0] = 100.0
    now[0] = 102.0
    read = clock.read(counts)
    assert (read["samples_per_second"], read["images_per_second"], read["label_tokens_per_second"]) == (
        2,
        4,
        20,
    )
    assert not counts
    now[0] = 103.0
    assert clock.read(Counter(samples=3))["samples_per_second"] == 3


def test_log_entries_are_written_at_once_and_never_twice(tmp_path):
    log, state, control = LogFile(tmp_path), TrainerState(is_world_process_zero=True), TrainerControl()
    write_log(tmp_path, [{"step": step} for step in range(9)])
    state.log_history = [{"step": 0}, {"step": 1}]  # of a checkpoint before the process was killed
    log.on_train_begin(None, state, control)
    assert read_log(tmp_path) == [{"step": 0}, {"step": 1}]
    state.log_history.append({"step": 2, "loss": 0.5})
    log.on_log(None, state, control)
    assert [entry["step"] for entry in read_log(tmp_path)] == [0, 1, 2]


def test_a_truncated_log_line_is_ignored(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1}]


def test_tensorboard_has_every_log_entry(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    last = training_entries(run)[-1]
    assert events.Scalars("train/gate/attention/0")[-1].value == pytest.approx(last["gate/attention/0"])


def test_repeated_steps_replace_earlier_tensorboard_events(tmp_path):
    args = SimpleNamespace(to_json_string=lambda: "{}", output_dir=str(tmp_path))
    for begin, value in ((0, 1.0), (2, 2.0)):
        state = TrainerState(is_world_process_zero=True, global_step=begin)
        board = monitoring.TensorBoard(tmp_path)
        board.on_train_begin(args, state, TrainerControl())
        for state.global_step in range(begin + 1, 5):
            board.on_log(args, state, TrainerControl(), logs={"loss": value})
        board.on_train_end(args, state, TrainerControl())
        time.sleep(1.1)  # a file of events is named after the second
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]


def test_a_missing_tracker_is_refused_by_name_before_loading(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(monitoring, "find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        refusal = rf"report_to: {name} is not installed; pip install 'flamingo_ft\[{name}\]'"
        with pytest.raises(UserError, match=refusal):
            train(recipe(f"train.report_to=[{name}]"))
    assert not (tmp_path / "run").exists()


def test_a_log_folder_does_not_count_as_the_installed_tracker(tmp_path, monkeypatch):
    """wandb writes its logs to a folder called wandb, which Python then finds as a namespace package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    assert importlib.util.find_spec("wandb").origin is None
    with pytest.raises(UserError, match="report_to: wandb is not installed"):
        check_trackers(SimpleNamespace(report_to=("wandb",)))


def test_wandb_and_trackio_are_local_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    environment = {"GRADIO_ANALYTICS_ENABLED": "True"}
    monkeypatch.setattr(monitoring.os, "environ", environment)
    monkeypatch.setattr(monitoring, "WandbCallback", object)
    monkeypatch.setattr(monitoring, "TrackioCallback", object)
    tracker_callbacks(SimpleNamespace(report_to=("wandb", "trackio"), output_dir=tmp_path))
    assert environment["WANDB_MODE"] == "offline" and environment["GRADIO_ANALYTICS_ENABLED"] == "True"
    environment.clear()
    tracker_callbacks(SimpleNamespace(report_to=("tensorboard",), output_dir=tmp_path))
    assert environment == {}


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_fit_the_terminal(monkeypatch, width, terminal):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    progress, state = progress_bars(), TrainerState(max_steps=123_456, global_step=4_567)
    bar, logs = ProgressBar(progress), {"loss": 0.1234, "memory_gib": 71.234}
    logs |= {"label_tokens_per_second": 123_456.7, "images_per_second": 1_234.5}
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs=logs)
    lines = "".join(segment.text for segment in console.render(progress.get_renderable())).splitlines()
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines) if terminal and width >= 80 else out.getvalue()
    if not terminal or width >= 80:
        for expected in ("loss 0.1234", "123,457 label tokens/s", "1,234 images/s", "71.23 GiB"):
            assert expected in text


def test_the_logged_epoch_counts_passes_over_the_data(run):
    """Two rows, two per step; Trainer would count the endless loader as one epoch."""
    assert [entry["epoch"] for entry in read_log(run) if "loss" in entry] == [1, 2, 3, 4]


def without_a_terminal(monkeypatch) -> tuple[io.StringIO, list[float]]:
    """Return the stream that the bars print to, and a fake clock."""
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, width=200, force_terminal=False)
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return out, now


def test_without_a_terminal_an_evaluation_prints_a_line(monkeypatch):
    out, _ = without_a_terminal(monkeypatch)
    progress, state = progress_bars(), TrainerState(max_steps=300, global_step=50)
    bar = ProgressBar(progress, [ACCURACY])
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"eval_loss": 1.25, "eval_accuracy": 0.715})
    gap = {"image_loss_gap": 0.25, "image_loss_gap_standard_error": 0.01, "image_loss_gap_samples": 9}
    bar.on_log(None, state, None, logs={f"eval_{key}": value for key, value in gap.items()})
    bar.on_log(None, state, None, logs={"eval_loss": 1.5})
    assert out.getvalue().splitlines() == [
        "step 50/300 · held-out loss 1.2500 · accuracy 71.5 %",
        "step 50/300 · with another image +0.25 ± 0.01",
        "step 50/300 · held-out loss 1.5000",
    ]


def test_without_a_terminal_a_long_task_prints_a_line_every_half_minute(monkeypatch):
    out, now = without_a_terminal(monkeypatch)
    progress = progress_bars()
    task = progress.add_task("evaluating", total=1000, note="")
    for _ in range(100):
        now[0] += 1.5
        progress.advance(task)
    lines = out.getvalue().splitlines()
    assert len(lines) == 150 // LINE_SECONDS and lines[0].startswith("evaluating: 20/1,000")


def test_without_a_terminal_what_is_printed_stands_in_the_order_of_events(monkeypatch):
    """Bars that are drawn at the end would stand below the lines of what came after them."""
    out, _ = without_a_terminal(monkeypatch)
    with progress_bars() as progress:
        before = progress.add_task("evaluating, before", total=2, note="")
        progress.advance(before, 2)
        progress.finish(before)
        state = TrainerState(max_steps=10, global_step=10)
        bar = ProgressBar(progress)
        bar.on_train_begin(None, state, None)
        bar.on_log(None, state, None, logs={"loss": 0.5, "memory_gib": 1.0})
    assert out.getvalue().splitlines() == [
        "evaluating, before: 2 in 0:00:00",
        "step 10/10 · loss 0.5000 · 1.00 GiB",
    ]


def test_reports_take_little_time_however_often_is_logged(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def draw(folder, **_):
        drawn.append(now[0])
        now[0] += 4

    monkeypatch.setattr("flamingo_ft.report.page.try_report", draw)
    report, state = LiveReport(tmp_path), TrainerState(is_world_process_zero=True)
    while now[0] < 1000:
        report.on_log(None, state, None)
        now[0] += 1
    assert drawn[0] >= 30 and all(
        later - before >= 84 for before, later in zip(drawn, drawn[1:], strict=False)
    )
    assert 4 * len(drawn) <= 0.05 * now[0]


def test_the_log_is_json_lines(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    assert len(lines) == STEPS + 1 and all(isinstance(json.loads(line), dict) for line in lines)
