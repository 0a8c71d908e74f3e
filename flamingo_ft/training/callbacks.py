"""What a run shows and keeps while it trains."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft.adapters import save_adapter
from flamingo_ft.model import FlamingoProcessor


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


class KeepAdapter(TrainerCallback):
    """Saves the adapter every so many steps."""

    def __init__(self, processor: FlamingoProcessor, every: int, folder_of_step: Any):
        self.processor = processor
        self.every = every
        self.folder_of_step = folder_of_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0:
            save_adapter(model, self.processor, self.folder_of_step(state.global_step))
