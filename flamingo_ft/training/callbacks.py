"""What a run shows while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import processes

WIDEST_BAR, NARROWEST_BAR = 40, 4
BESIDE_BAR = 64  # columns of a terminal that the bar leaves to words and numbers


class Bars(Progress):
    """Bars, and below them the figures of what runs now: their fields ``note``, beside a bar, and ``below``."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields.get("below"):
                yield Text(task.fields["below"], style="dim", no_wrap=True, overflow="ellipsis")


def progress_bars(stderr: bool = False) -> Progress:
    """Bars for training, evaluation and checks alike; stderr: away from what a command prints."""
    console = Console(stderr=stderr)
    return Bars(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=max(NARROWEST_BAR, min(WIDEST_BAR, console.width - BESIDE_BAR))),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not processes.is_main(),
    )


class ProgressBar(TrainerCallback):
    """One step of the bar per optimizer step, the newest figures of the log with it.

    Where nobody watches a bar grow, as in a file, each entry of the log is a line.
    """

    def __init__(self, progress: Progress):
        self.progress = progress
        self.alive = progress.console.is_interactive or progress.console.is_jupyter

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        total, done = state.max_steps, state.global_step
        self.task = self.progress.add_task("training", total=total, completed=done, note="", below="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss, figures = f"loss {float(logs['loss']):.4f}", " · ".join(_figures(logs))
        self.progress.update(self.task, completed=state.global_step, note=loss, below=f"  {figures}")
        if not self.alive and state.is_world_process_zero:
            left = self.progress.tasks[self.task].time_remaining
            when = [] if left is None else [f"{_clock(left)} left"]
            line = " · ".join([f"step {state.global_step}/{state.max_steps}", loss, figures, *when])
            self.progress.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self.task, below="")


def _figures(logs: dict[str, float]) -> list[str]:
    """Throughput and memory in words."""
    rates = {"label tokens/s": "label_tokens_per_second", "images/s": "images_per_second"}
    told = [f"{rate(logs[key])} {unit}" for unit, key in rates.items() if key in logs]
    return told + ([f"{logs['memory_gib']:.2f} GiB"] if "memory_gib" in logs else [])


def rate(value: float) -> str:
    """A number a second, with as many places as tell something: 12,346 or 3.2."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
