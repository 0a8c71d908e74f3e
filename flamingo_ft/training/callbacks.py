"""What a run shows while it trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft.evaluation.metrics import METRICS
from flamingo_ft.formatting import significant
from flamingo_ft.progress import Bars


class ProgressBar(TrainerCallback):
    """One step of the bar per optimizer step, with the newest figures of the log; evaluations are a line each.

    Without a terminal, each entry of the log is a line.
    """

    def __init__(self, progress: Bars):
        self.progress = progress

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
        logs, place = logs or {}, f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            self.progress.line(" · ".join([place, *_evaluated(logs)]))
        if "loss" not in logs:
            return
        loss, figures = f"loss {float(logs['loss']):.4f}", " · ".join(_figures(logs))
        self.progress.update(self.task, completed=state.global_step, note=loss, below=f"  {figures}")
        if not self.progress.interactive:
            left = self.progress.time_left(self.task)
            self.progress.line(" · ".join([place, loss, figures, *([f"{left} left"] if left else [])]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.update(self.task, below="")


def _evaluated(logs: dict[str, float]) -> list[str]:
    values = [f"held-out loss {float(logs['eval_loss']):.4f}"]
    for name, metric in METRICS.items():
        if f"eval_{name}" in logs:
            values.append(f"{metric.label} {metric.text(logs[f'eval_{name}'])}")
    return values


def _figures(logs: dict[str, float]) -> list[str]:
    """Throughput and memory in words."""
    rates = {"label tokens/s": "label_tokens_per_second", "images/s": "images_per_second"}
    figures = [f"{significant(logs[key], 2)} {unit}" for unit, key in rates.items() if key in logs]
    return figures + ([f"{logs['memory_gib']:.2f} GiB"] if "memory_gib" in logs else [])
