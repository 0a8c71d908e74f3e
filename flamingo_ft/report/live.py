"""Write the report during a run, and once more when it ends, however it ends."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.errors import StoppedBySignal

from .page import write_report

MIN_INTERVAL = 30  # seconds between two reports
COST_FACTOR = 20  # after a report that took one second, wait 20: at most 5 % of the time


class LiveReport(TrainerCallback):
    """Write the report at log entries, at most every 30 seconds and for at most 5 % of the time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.next_time = time.monotonic() + MIN_INTERVAL

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        began = time.monotonic()
        if state.is_world_process_zero and began >= self.next_time:
            try_report(self.folder, in_progress=True)
            ended = time.monotonic()
            self.next_time = ended + max(MIN_INTERVAL, COST_FACTOR * (ended - began))


@contextmanager
def final_report(folder: Path) -> Generator[None]:
    """Write the report when the block ends or raises, if a run has begun in the folder."""
    try:
        yield
    except BaseException as error:
        _report_at_end(folder, stopped_by=reason(error))
        raise
    _report_at_end(folder)


def reason(error: BaseException) -> str:
    """Return in one line what ended a run."""
    if isinstance(error, StoppedBySignal):
        return signal.Signals(error.number).name
    return f"an error: {str(error) or type(error).__name__}".splitlines()[0]


def try_report(folder: Path, **options: Any) -> None:
    """Write the report; if that fails, warn and let the run continue."""
    try:
        write_report(folder, **options)
    except Exception as error:  # a report must never end a run
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"{folder}: the report could not be written: {problem}", stacklevel=2)


def _report_at_end(folder: Path, **options: Any) -> None:
    if processes.is_main() and (folder / RECIPE_FILE).is_file():
        try_report(folder, **options)
