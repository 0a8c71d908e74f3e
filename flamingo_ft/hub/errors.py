"""What goes wrong between here and the Hub, each in a line that says what to do; a token is in none of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import MAX_MESSAGE_CHARACTERS, one_line
from flamingo_ft.machine_errors import disk_failure

# Whichever HTTP library the client uses: its errors are those that have no answer of a Hub.
HTTP = import_module(HfHubHTTPError.__bases__[0].__module__)

# What the client was seen to raise: for a Hub's answer, for none, for files and names, for an upload that failed.
CLIENT_ERRORS = (HfHubHTTPError, HTTP.HTTPError, OSError, RuntimeError, ValueError)

INFORMATIVE_ERRORS = (
    HfHubHTTPError,
    HTTP.TransportError,
    OfflineModeIsEnabled,
    HFValidationError,
    LocalTokenNotFoundError,
)
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)  # statuses that another try may not find again
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
TOKEN = re.compile(r"hf_\w+")


def hub_error(asked: str, error: Exception, writes: bool = False) -> UserError:
    """The error of a command that asked the Hub for, or wanted to write to, ``asked``."""
    return UserError(f"{asked}: {error_reason(error, writes)}")


def error_reason(error: Exception, writes: bool = False) -> str:
    """What was found, and what to do about it. writes: whether something was to be written there."""
    first = cause(error)
    status = status_of(first)
    if full := disk_failure(first):
        return (
            f"cannot be kept on this machine ({full}); make room, or set HF_HOME to a folder on another disk"
        )
    if isinstance(first, GatedRepoError):
        return f"is gated; accept its terms on its page of the Hub, then {LOG_IN}"
    if isinstance(first, RevisionNotFoundError):
        return "is not on the Hub, though the repository is; check the revision"
    if isinstance(first, HFValidationError):
        return f"no name of a repository ({safe_message(first)}); give org/name"
    if isinstance(first, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and is_offline_mode()
    ):
        remedy = "; unset it" if writes else ", and it is not whole in the cache; unset it, or give a folder"
        return f"HF_HUB_OFFLINE is set{remedy}"
    if isinstance(first, LocalTokenNotFoundError) or (status == 401 and not _is_missing(first)):
        return f"found no valid token; {LOG_IN}" + (" to a token that may write" if writes else "")
    if _is_missing(first) or status == 403:
        return _closed(first, writes)
    return _trouble(first, status)


def _is_missing(error: Exception) -> bool:
    return isinstance(error, RepositoryNotFoundError)


def _closed(error: Exception, writes: bool) -> str:
    """A repository that is not there, or not for this token: the Hub does not say which."""
    if not writes and _is_missing(error):
        return f"is no folder here, and not on the Hub, or is private; check the name, or {LOG_IN}"
    if status_of(error) == 401:
        return f"found no valid token; {LOG_IN} to a token that may write"
    verb, other = ("write", "name a repository of your own") if writes else ("read", "ask its owner")
    return f"the token may not {verb} there; use one that may, or {other}"


def _trouble(error: Exception, status: int | None) -> str:
    if status == 429:
        return "the Hub takes no more requests from here for a while (429); try again later"
    if status is not None and status >= 500:
        return f"the Hub is in trouble ({status}); try again later"
    if isinstance(error, HTTP.ConnectError):
        return f"the Hub cannot be reached ({safe_message(error)}); check the network"
    if isinstance(error, HTTP.TransportError):
        return f"the connection to the Hub broke off ({safe_message(error)}); try again"
    if isinstance(error, LocalEntryNotFoundError):
        return "is not in the cache, and the Hub was not to be asked; check the name, or give a folder"
    if isinstance(error, EntryNotFoundError):
        return f"the repository holds no such file ({safe_message(error)}); check the name"
    return f"failed ({safe_message(error)}); try again"


def cause(error: BaseException) -> BaseException:
    """What went wrong first, as far as it tells something: the client wraps it, once or twice."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, INFORMATIVE_ERRORS):
        seen = seen.__cause__ or seen.__context__
    return error if seen is None else seen


def status_of(error: BaseException) -> int | None:
    """The status of a Hub's answer; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: Exception) -> bool:
    """Whether another try may go well: a Hub in trouble, or a connection that broke off."""
    first = cause(error)
    return status_of(first) in TRANSIENT_STATUSES or isinstance(first, HTTP.TransportError)


def is_unreachable(error: Exception) -> bool:
    """Whether there was no way to the Hub at all."""
    return isinstance(cause(error), HTTP.ConnectError)


def safe_message(error: BaseException) -> str:
    """What the client said, on one line, without a token and without what a signed address carries."""
    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", TOKEN.sub("hf_...", str(error)))
    for secret in filter(None, [get_token()]):
        text = text.replace(secret, "...")
    return one_line(text, MAX_MESSAGE_CHARACTERS) or type(error).__name__


ATTEMPTS, FIRST_WAIT = 4, 2.0  # tries of one thing, and seconds before the second, doubled for each after it
LONGEST_WAIT = 60.0  # seconds, where a Hub names its own

T = TypeVar("T")


def with_retries(
    action: Callable[[], T],
    worth_it: Callable[[Exception], bool] = is_transient,
    say: Callable[[Exception, float], None] = lambda error, seconds: None,
) -> T:
    """What ``action`` gives, at the latest after `ATTEMPTS` tries; its error where that is not ``worth_it``, or the last.

    say: hears of each failure that another try follows, and of the seconds until then.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except CLIENT_ERRORS as error:
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
