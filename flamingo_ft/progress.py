"""Progress bars in a terminal; lines where nobody watches a bar grow, as in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flamingo_ft.formatting import clock

LINE_SECONDS = 30  # between two lines about the same task, without a terminal
WIDEST_BAR, NARROWEST_BAR = 40, 4
BESIDE_BAR = 64  # columns of a terminal that the bar leaves to words and numbers


class Bars(Progress):
    """Bars with a task's field ``note`` beside its bar and its field ``below`` under all bars.

    Without a terminal, a task that advances prints a line every `LINE_SECONDS`.
    """

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
        self._last_line = time.monotonic()

    @property
    def interactive(self) -> bool:
        """Whether somebody sees the bars grow: a terminal or a notebook."""
        return self.console.is_interactive or self.console.is_jupyter

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields.get("below"):
                yield Text(task.fields["below"], style="dim", no_wrap=True, overflow="ellipsis")

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._print_progress(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_progress(task_id)

    def line(self, text: str) -> None:
        """Print a line, above the bars where there are any."""
        if not self.disable:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            self._last_line = time.monotonic()

    def time_left(self, task_id: TaskID) -> str | None:
        """h:mm:ss until the task is done, as far as that is known."""
        left = self._tasks[task_id].time_remaining
        return None if left is None else clock(left)

    def _print_progress(self, task_id: TaskID) -> None:
        if self.interactive or time.monotonic() - self._last_line < LINE_SECONDS:
            return
        task, left = self._tasks[task_id], self.time_left(task_id)
        count = f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}")
        self.line(f"{task.description}: {count}" + (f" · {left} left" if left else ""))


def progress_bars(stderr: bool = False, disable: bool = False) -> Bars:
    """Bars for training, evaluation and checks alike.

    stderr: keep them away from what a command prints. disable: show nothing, as in all but one of several processes.
    """
    console = Console(stderr=stderr)
    return Bars(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=max(NARROWEST_BAR, min(WIDEST_BAR, console.width - BESIDE_BAR))),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=disable,
    )
