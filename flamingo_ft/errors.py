"""What ends a command in a way that a user is meant to read."""

from __future__ import annotations

import signal
from typing import Any


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, what was found, and what to do about it.

    The command line prints it without a traceback and exits with code 2.
    """


class ToldElsewhere(UserError):
    """The same, in a process that leaves telling it to the main one."""


class Stopped(BaseException):
    """A run ended as it was told to, by a signal. step: of the checkpoint that it saved, if it did."""

    def __init__(self, number: int, step: int | None = None):
        saved = "" if step is None else f" after step {step}, which is saved"
        super().__init__(f"stopped by {signal.Signals(number).name}{saved}")
        self.number, self.step = number, step


class OutOfMemory(UserError):
    """A run that did not fit into memory. plan: what `flamingo-ft plan --json` tells of it, where that could be made."""

    plan: dict[str, Any] | None = None
