"""Stop a run on SIGINT (Ctrl-C) or SIGTERM (a machine that shuts down).

During training, the current optimizer step is finished and a checkpoint saved. At any other time, and on a
second signal, the run stops at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.errors import StoppedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Ends training, with a checkpoint, after the step in which a signal arrived.

    signal: number of the received signal, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
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
        if processes.any_process(self.signal is not None):
            self.signal = self.signal or signal.SIGTERM  # it may have reached another process only
            control.should_save = control.should_training_stop = True

    @contextmanager
    def handlers_installed(self) -> Generator[None]:
        """Handle the signals in the block; outside the main thread, where Python forbids it, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        is_second = self.signal is not None
        self.signal = number
        if is_second or not self._training:
            raise StoppedBySignal(number)
