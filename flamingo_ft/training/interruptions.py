"""How a run ends when the machine interferes: a signal, memory that runs out, a full disk, a killed worker.

A signal (SIGINT from Ctrl-C, SIGTERM from a machine that shuts down) makes training finish its optimizer
step and save a checkpoint. The others become one-line errors that say what to do.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.errors import OutOfMemory, StoppedBySignal, UserError
from flamingo_ft.formatting import MAX_MESSAGE_CHARACTERS, error_message, one_line
from flamingo_ft.machine_errors import disk_failure, out_of_memory
from flamingo_ft.plan.plan_report import make_plan_report

from .checkpoint_folders import checkpoint_root, newest_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
OOM_REMEDIES = {
    "training": "lower train.batch_size or follow the plan below",
    "evaluation": "lower eval.batch_size or eval.max_new_tokens; the plan below is that of a training step",
    "loading": "quantize the backbones, or follow the plan below",
}
WORKER_DIED = "DataLoader worker"  # how torch's error begins


# --- signals ---


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops training at the end of the step in which a signal arrives.

    At any other time, and on a second signal, the run stops at once with `StoppedBySignal`.

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


# --- out of memory ---


@contextmanager
def oom_as_user_error(activity: str) -> Generator[None]:
    """Raise `OutOfMemory` if memory runs out in the block. activity: a key of ``OOM_REMEDIES``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        description = out_of_memory(error)
        if description is None:
            raise
        raise OutOfMemory(f"{activity}: {description}; {OOM_REMEDIES[activity]}") from None


def attach_memory_plan(error: OutOfMemory, recipe: Recipe) -> OutOfMemory:
    """Return ``error`` with the recipe's memory plan, as `flamingo-ft plan` shows it, if one can be made."""
    error = error.with_traceback(None)
    error.__context__ = None  # the original error's traceback holds every frame, and with them the tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        with oom_as_user_error("training"):
            error.plan = make_plan_report(recipe).record()
    except UserError:  # no memory for the plan either, or a model that cannot be planned
        error.plan = None
    return error


# --- a full disk, a killed worker ---


@contextmanager
def io_errors_as_user_error(train_config: TrainSection) -> Generator[None]:
    """Raise UserError for a full disk or a killed worker in the block; `save_checkpoint` reports its own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if str(error).startswith(WORKER_DIED):
            raise UserError(_worker_message(error, train_config)) from error
        failure = disk_failure(error)
        if failure is None:
            raise
        raise UserError(
            f"{train_config.output_dir}: cannot write ({one_line(failure, MAX_MESSAGE_CHARACTERS)}); "
            f"free disk space, and {_how_to_resume(train_config)}"
        ) from error


def _worker_message(error: Exception, train_config: TrainSection) -> str:
    return (
        f"train.num_workers: a data-loading worker died ({error_message(error)}), most likely out of memory; "
        f"lower train.num_workers, or set it to 0, and {_how_to_resume(train_config)}"
    )


def _how_to_resume(train_config: TrainSection) -> str:
    newest = newest_checkpoint(checkpoint_root(train_config))
    return f"resume from {newest} with --resume" if newest else "start again with --resume"
