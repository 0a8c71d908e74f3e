"""Another try, after a wait, for what may go well the next time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import FAILURES, cause, passes

ATTEMPTS, FIRST_WAIT = 4, 2.0  # tries of one thing, and seconds before the second, doubled for each after it
LONGEST_WAIT = 60.0  # seconds, where a Hub names its own

T = TypeVar("T")


def patiently(
    action: Callable[[], T],
    worth_it: Callable[[Exception], bool] = passes,
    say: Callable[[Exception, float], None] = lambda error, seconds: None,
) -> T:
    """What ``action`` gives, at the latest after `ATTEMPTS` tries; its error where that is not ``worth_it``, or the last.

    say: hears of each failure that another try follows, and of the seconds until then.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except FAILURES as error:
            if not worth_it(error):
                raise
            wait = max(FIRST_WAIT * 2**attempt, _asked_to_wait(error))
            say(error, wait)
        time.sleep(wait)
    return action()


def _asked_to_wait(error: Exception) -> float:
    """Seconds that the Hub's answer names, within reason."""
    headers = getattr(getattr(cause(error), "response", None), "headers", {})
    named = headers.get("Retry-After") or ""
    return min(float(named), LONGEST_WAIT) if named.isdigit() else 0.0
