"""The one error a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, what was found, and what to do about it.

    The command line prints it without a traceback and exits with code 2.
    """
