"""The one error a user is meant to read."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, what was found, and what to do about it.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: Exception) -> str:
    """What another library said, on one line and no longer than a line should be, to be quoted in a `UserError`."""
    return " ".join(str(error).split())[:200]


class OutOfMemory(UserError):
    """A run that did not fit into memory. plan: what `flamingo-ft plan --json` tells of it, where that could be made."""

    plan: dict[str, Any] | None = None
