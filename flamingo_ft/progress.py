"""Progress bars in a terminal or notebook; lines of text elsewhere, as in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flamingo_ft.formatting import clock

LINE_SECONDS = 30  # between two lines of progress, without a terminal
MAX_BAR_WIDTH, MIN_BAR_WIDTH = 40, 4
TEXT_WIDTH = 64  # columns of a terminal for the text beside a bar


class Bars(Progress):
    """rich's progress bars, with a task's field ``note`` beside its bar and ``below`` under all bars.

    Without a terminal, progress is printed as a line every `LINE_SECONDS`, and no bars at the end, where they
    would stand below lines that were printed later.
    """

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
        self._last_line = time.monotonic()

    @property
    def interactive(self) -> bool:
        """Whether bars can be redrawn: in a terminal or a notebook."""
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
        """Print a line, above the bars if there are any."""
        if not self.disable:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            self._last_line = time.monotonic()

    def finish(self, task_id: TaskID) -> None:
        """End a task: its bar stays as it is; without a terminal, a line says how long it took."""
        if not self.interactive:
            task = self._task(task_id)
            self.line(f"{task.description}: {task.completed:,.0f} in {clock(task.elapsed or 0)}")

    def stop(self) -> None:
        self.live.stop()  # rich adds an empty line without a terminal

    def time_left(self, task_id: TaskID) -> str | None:
        """Return the estimated time until the task is done as h:mm:ss; None if unknown or done."""
        left = self._task(task_id).time_remaining
        return clock(left) if left else None

    def _task(self, task_id: TaskID) -> Task:
        return next(task for task in self.tasks if task.id == task_id)

    def _print_progress(self, task_id: TaskID) -> None:
        if self.interactive or time.monotonic() - self._last_line < LINE_SECONDS:
            return
        task, left = self._task(task_id), self.time_left(task_id)
        total = "" if task.total is None else f"/{task.total:,.0f}"
        remaining = f" · {left} left" if left else ""
        self.line(f"{task.description}: {task.completed:,.0f}{total}{remaining}")


def progress_bars(stderr: bool = False, disable: bool = False) -> Bars:
    """Return the bars that training, evaluation and checks use.

    stderr: draw them on stderr, apart from a command's result. disable: show nothing, as in all processes but
    the main one.
    """
    console = Console(stderr=stderr)
    return Bars(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=max(MIN_BAR_WIDTH, min(MAX_BAR_WIDTH, console.width - TEXT_WIDTH))),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=disable,
        transient=not (console.is_interactive or console.is_jupyter),
    )
