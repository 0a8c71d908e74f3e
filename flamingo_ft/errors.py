"""Exceptions that end a command with a message instead of a traceback."""

from __future__ import annotations

import signal
from typing import Any


class UserError(ValueError):
    """Invalid input. The message is one line per problem: where it is, what is wrong, what was found, what to
    do.

    The command line prints it without a traceback and exits with code 2.
    """


class ReportedElsewhere(UserError):
    """A UserError that another process of the same run reports; this one ends silently."""


class OutOfMemory(UserError):
    """Training ran out of memory. plan: the record that `flamingo-ft plan --json` prints, where it could be
    computed."""

    plan: dict[str, Any] | None = None


class StoppedBySignal(BaseException):
    """A run ended early because of a signal, after saving a checkpoint at ``step`` if that is not None."""

    def __init__(self, number: int, step: int | None = None):
        saved = "" if step is None else f" after step {step}, which is saved"
        super().__init__(f"stopped by {signal.Signals(number).name}{saved}")
        self.number, self.step = number, step
