"""Watching a run: throughput, memory, gates and learning rates; the progress bar; experiment trackers."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from flamingo_ft import processes
from flamingo_ft.config import TrainSection
from flamingo_ft.config.tables import CROSS_ATTENTION
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.image_loss_gap import ImageLossGap
from flamingo_ft.evaluation.loss_by_kind import TEXT_ONLY, log_key
from flamingo_ft.evaluation.metrics import Metric
from flamingo_ft.formatting import GIB, significant
from flamingo_ft.model.sharding import full_tensor
from flamingo_ft.progress import Bars

COUNTED = ("samples", "images", "label_tokens")  # per second in the log
GATES = {"attention": "attn_gate", "feed_forward": "ff_gate"}  # name in the log -> attribute of a block

# Defaults where the environment sets nothing: all measurements stay on this machine.
LOCAL_DEFAULTS = {
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"},
}


# --- what goes into a log entry ---


class ThroughputMeter:
    """Measures training time, without what is inside `paused`, and peak memory between two log entries."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Restart the clock and the peak-memory statistics."""
        self._start_time, self._paused_seconds = time.monotonic(), 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Exclude the block from training time: evaluation, saving, reports. Nested blocks count once."""
        began, paused_before = time.monotonic(), self._paused_seconds
        try:
            yield
        finally:
            self._paused_seconds = paused_before + time.monotonic() - began

    def read(self, counts: Counter) -> dict[str, float]:
        """Return throughput and memory since the last call, then reset the clock and ``counts``.

        ``samples_per_second``, ``images_per_second`` and ``label_tokens_per_second`` are sums over all
        processes, ``memory_gib`` is the largest of them.
        """
        seconds = max(time.monotonic() - self._start_time - self._paused_seconds, 1e-9)
        own = [*(counts[name] for name in COUNTED), seconds, memory_gib()]
        *totals, all_seconds, all_memory = zip(*processes.all_gather(own), strict=True)
        counts.clear()
        self.reset()
        rates = {
            f"{name}_per_second": sum(total) / max(all_seconds)
            for name, total in zip(COUNTED, totals, strict=True)
        }
        return rates | {"memory_gib": max(all_memory)}


def memory_gib() -> float:
    """Return the peak GPU memory since the last reset or, on a CPU, the process's current memory, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB


def learning_rates(optimizer: Any, first_rate: float) -> dict[str, float]:
    """Return the learning rate of each part in one step, as ``learning_rate/<part>``.

    first_rate: the rate of the first parameter group in that step, which is the one that Trainer logs. The
    scheduler scales all groups by the same factor.
    """
    groups = optimizer.param_groups
    return {
        f"learning_rate/{group['name']}": first_rate * group["initial_lr"] / groups[0]["initial_lr"]
        for group in groups
        if "name" in group and "initial_lr" in group
    }


def gate_values(model: torch.nn.Module) -> dict[str, float]:
    """Return tanh of each gate, in -1..1, keyed by its kind and the decoder layer that its block precedes."""
    gates: dict[str, torch.Tensor] = {}
    blocks: Any = getattr(model, CROSS_ATTENTION.module, ())
    for name, attribute in GATES.items():
        for layer, block in enumerate(blocks):
            if block is not None:
                gates[f"gate/{name}/{layer}"] = getattr(block, attribute).detach()
    if not gates:
        return {}
    values = [full_tensor(gate).float().tanh().reshape(()) for gate in gates.values()]
    return dict(zip(gates, torch.stack(values).tolist(), strict=True))


# --- the progress bar ---


class ProgressBar(TrainerCallback):
    """One bar over the optimizer steps, with the newest values of the log; each evaluation prints a line.

    Without a terminal, each log entry prints a line. metrics: those of answers that evaluations may log.
    """

    def __init__(self, progress: Bars, metrics: Sequence[Metric] = ()):
        self.progress, self.metrics = progress, metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        total, done = state.max_steps, state.global_step
        self.task = self.progress.add_task("training", total=total, completed=done, note="", below="")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        step = f"step {state.global_step}/{state.max_steps}"
        if parts := _evaluation_parts(logs, self.metrics):
            self.progress.line(" · ".join([step, *parts]))
        if "loss" not in logs:
            return
        loss, details = (
            f"{_reward_part(logs)}loss {float(logs['loss']):.4f}",
            " · ".join(_throughput_parts(logs)),
        )
        self.progress.update(self.task, completed=state.global_step, note=loss, below=f"  {details}")
        if not self.progress.interactive:
            left = self.progress.time_left(self.task)
            self.progress.line(" · ".join([step, loss, details, *([f"{left} left"] if left else [])]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.update(self.task, below="")


def _evaluation_parts(logs: dict[str, float], metrics: Sequence[Metric]) -> list[str]:
    """Return what an evaluation measured, of these metrics; nothing for an entry about training."""
    metrics = [metric for metric in metrics if f"eval_{metric.name}" in logs]
    loss = [f"held-out loss {float(logs['eval_loss']):.4f}"] if "eval_loss" in logs else []
    gap = ImageLossGap.of_log(logs)
    swapped = [] if gap is None else [f"with another image {gap.text}"]
    text_only = log_key(TEXT_ONLY)
    swapped += [f"text-only loss {float(logs[text_only]):.4f}"] if text_only in logs else []
    scores = [f"{metric.label} {metric.text(logs[f'eval_{metric.name}'])}" for metric in metrics]
    return [*loss, *swapped, *scores]


def _reward_part(logs: dict[str, float]) -> str:
    """Return the mean reward of sampled answers, which matters more than the loss of GRPO."""
    return f"reward {float(logs['reward']):.3f} · " if logs.get("reward") is not None else ""


def _throughput_parts(logs: dict[str, float]) -> list[str]:
    rates = {"label tokens/s": "label_tokens_per_second", "images/s": "images_per_second"}
    parts = [f"{significant(logs[key], 2)} {unit}" for unit, key in rates.items() if logs.get(key)]
    return parts + ([f"{logs['memory_gib']:.2f} GiB"] if "memory_gib" in logs else [])


# --- experiment trackers ---


def check_trackers(train_config: TrainSection) -> None:
    """Raise UserError for a tracker in ``train.report_to`` that is not installed."""
    for name in train_config.report_to:
        spec = find_spec(name)
        # A tracker's log folder of the same name looks like a namespace package, without an origin.
        if spec is None or spec.origin is None:
            package = "flamingo_ft" if name == "tensorboard" else f"flamingo_ft[{name}]"
            raise UserError(
                f"train.report_to: {name} is not installed; "
                f"pip install '{package}', or leave {name} out of the list"
            )


def tracker_callbacks(train_config: TrainSection) -> list[TrainerCallback]:
    """Return transformers' callback for each name in ``train.report_to``.

    They keep everything on this machine unless the environment says otherwise (WANDB_MODE=online,
    TRACKIO_SPACE_ID).
    """
    factories: dict[str, Callable[[], TrainerCallback]] = {
        "tensorboard": lambda: TensorBoard(train_config.output_dir / "tensorboard"),
        "trackio": TrackioCallback,
        "wandb": WandbCallback,
    }
    for name in train_config.report_to:
        for variable, value in LOCAL_DEFAULTS.get(name, {}).items():
            os.environ.setdefault(variable, value)
    if "wandb" in train_config.report_to:
        os.environ.setdefault("WANDB_DIR", str(train_config.output_dir))
    return [factories[name]() for name in train_config.report_to]


class TensorBoard(TensorBoardCallback):
    """Writes TensorBoard events of a run; on resume, repeated steps replace the earlier events."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        if state.is_world_process_zero:
            purge_step = state.global_step + 1 if state.global_step else None
            self.tb_writer = SummaryWriter(log_dir=str(self.folder), purge_step=purge_step)
        super().on_train_begin(args, state, control, **options)
