"""A run that is told to stop: by Ctrl-C, or by a machine that is going down (SIGTERM).

While it trains, the optimizer step is finished and a checkpoint written; at any other time, and when told again, it
stops at once, for there is nothing to save that is not on disk.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.errors import StoppedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping(TrainerCallback):
    """Waits for a signal; ends training after the step in which one came.

    number: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._training = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if processes.any_process(self.number is not None):
            self.number = self.number or signal.SIGTERM  # another process was told
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, in the main thread; elsewhere they cannot be had, and go where they went before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._told) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, frame: Any) -> None:
        again, self.number = self.number is not None, number
        if again or not self._training:
            raise StoppedBySignal(number)
