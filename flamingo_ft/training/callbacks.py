"""What a run shows while it trains."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


from . import processes


def progress_bars(stderr: bool = False) -> Progress:
    """Bars for training, evaluation and checks alike; stderr: away from what a command prints."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True) if stderr else None,
        disable=not processes.is_main(),
    )


class ProgressBar(TrainerCallback):
    """One step of the bar per optimizer step, the newest loss beside it."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.task = self.progress.add_task("training", total=state.max_steps, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, note=f"loss {float(logs['loss']):.4f}")


