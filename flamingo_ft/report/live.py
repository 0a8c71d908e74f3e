"""The report while a run goes on, and however it ends."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.errors import StoppedBySignal

from .page import write_report

SECONDS_APART = 30
TIMES_ITS_COST = 20  # a report that takes a second is written every 20 seconds at most: 5 % of the time


class LiveReport(TrainerCallback):
    """Writes the report at entries of the log, at most every half minute and for 5 % of the time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.next = time.monotonic() + SECONDS_APART

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        began = time.monotonic()
        if state.is_world_process_zero and began >= self.next:
            draw(self.folder, goes_on=True)
            ended = time.monotonic()
            self.next = ended + max(SECONDS_APART, TIMES_ITS_COST * (ended - began))


@contextmanager
def leaving_a_report(folder: Path) -> Iterator[None]:
    """Write the report of a run when the block ends, in whatever way; none where no run began."""
    try:
        yield
    except BaseException as error:
        _draw_last(folder, stopped=reason(error))
        raise
    _draw_last(folder)


def reason(error: BaseException) -> str:
    """What ended a run, in a line."""
    if isinstance(error, StoppedBySignal):
        return signal.Signals(error.number).name
    return f"an error: {str(error) or type(error).__name__}".splitlines()[0]


def draw(folder: Path, **how: Any) -> None:
    """Write the report; where that fails, it is told, once, and the run goes on."""
    try:
        write_report(folder, **how)
    except Exception as error:  # whatever is wrong with a picture, training must not end by it
        warnings.warn(
            f"{folder}: the report could not be written: {type(error).__name__}: {error}", stacklevel=2
        )


def _draw_last(folder: Path, **how: Any) -> None:
    if processes.is_main() and (folder / RECIPE_FILE).is_file():
        draw(folder, **how)
