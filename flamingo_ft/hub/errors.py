"""Errors of the Hub client in one line that says what to do, without tokens; and retries."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
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

from .compat import http_library

# What the client raises: HTTP error responses, connection failures, file errors, invalid names, failed
# uploads.
CLIENT_ERRORS = (HfHubHTTPError, http_library.HTTPError, OSError, RuntimeError, ValueError)

# Those that say what is wrong; the client wraps them in others.
INFORMATIVE_ERRORS = (
    HfHubHTTPError,
    http_library.TransportError,
    OfflineModeIsEnabled,
    HFValidationError,
    LocalTokenNotFoundError,
)
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
TOKEN = re.compile(r"hf_\w+")

ATTEMPTS = 4
FIRST_WAIT = 2.0  # seconds before the second attempt, doubled for each later one
LONGEST_WAIT = 60.0  # seconds, where the Hub asks for a wait of its own

T = TypeVar("T")


class HubUnreachableError(UserError):
    """There was no connection to the Hub at all."""


def hub_error(name: str, error: Exception, writes: bool = False) -> UserError:
    """Return the error of a command that tried to read ``name`` from the Hub, or to write it there."""
    kind = HubUnreachableError if is_unreachable(error) else UserError
    return kind(f"{name}: {error_reason(error, writes)}")


def error_reason(error: Exception, writes: bool = False) -> str:
    """Return what went wrong and what to do about it.

    Args:
        writes: whether the client tried to write.
    """
    cause = informative_cause(error)
    status = status_of(cause)
    if full := disk_failure(cause):
        remedy = "make room, or set HF_HOME to a folder on another disk"
        return f"cannot be stored on this machine ({full}); {remedy}"
    if isinstance(cause, GatedRepoError):
        return f"is gated; accept its terms on its page of the Hub, then {LOG_IN}"
    if isinstance(cause, RevisionNotFoundError):
        return "is not on the Hub, though the repository is; check the revision"
    if isinstance(cause, HFValidationError):
        return f"not the name of a repository ({safe_message(cause)}); give org/name"
    if isinstance(cause, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and is_offline_mode()
    ):
        remedy = "; unset it" if writes else ", and the cache is incomplete; unset it, or give a folder"
        return f"HF_HUB_OFFLINE is set{remedy}"
    is_missing = isinstance(cause, RepositoryNotFoundError)
    if isinstance(cause, LocalTokenNotFoundError) or (status == 401 and not is_missing):
        return f"no valid token; {LOG_IN}" + (" to a token that may write" if writes else "")
    if is_missing or status == 403:
        return _access_reason(is_missing, status, writes)
    return _failure_reason(cause, status)


def _access_reason(is_missing: bool, status: int | None, writes: bool) -> str:
    """Describe a repository that is missing or closed to this token; the Hub does not say which."""
    if is_missing and not writes:
        hidden = "neither a local folder nor a visible Hub repository (it may be private)"
        return f"{hidden}; check the name, or {LOG_IN}"
    if status == 401:
        return f"no valid token; {LOG_IN} to a token that may write"
    verb, remedy = ("write", "name a repository of your own") if writes else ("read", "ask its owner")
    return f"the token may not {verb} there; use one that may, or {remedy}"


def _failure_reason(error: BaseException, status: int | None) -> str:
    if status == 429:
        return "the Hub limits the rate of requests from here (429); try again later"
    if status is not None and status >= 500:
        return f"the Hub is in trouble ({status}); try again later"
    if isinstance(error, http_library.ConnectError):
        return f"the Hub cannot be reached ({safe_message(error)}); check the network"
    if isinstance(error, http_library.TransportError):
        return f"the connection to the Hub broke off ({safe_message(error)}); try again"
    if isinstance(error, LocalEntryNotFoundError):
        return "is not in the cache, and only the cache may be used; check the name, or give a folder"
    if isinstance(error, EntryNotFoundError):
        return f"the repository has no such file ({safe_message(error)}); check the name"
    return f"failed ({safe_message(error)}); try again"


def informative_cause(error: BaseException) -> BaseException:
    """Return the first informative error in the chain of causes; ``error`` itself if there is none."""
    current: BaseException | None = error
    while current is not None and not isinstance(current, INFORMATIVE_ERRORS):
        current = current.__cause__ or current.__context__
    return error if current is None else current


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the Hub's answer; None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed: the Hub is in trouble, or the connection broke off."""
    cause = informative_cause(error)
    return status_of(cause) in TRANSIENT_STATUSES or isinstance(cause, http_library.TransportError)


def is_unreachable(error: Exception) -> bool:
    """Return whether there was no connection to the Hub at all."""
    return isinstance(informative_cause(error), http_library.ConnectError)


def safe_message(error: BaseException) -> str:
    """Return an error's message on one line, without tokens and without the parameters of signed URLs."""
    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", TOKEN.sub("hf_...", str(error)))
    if token := get_token():
        text = text.replace(token, "...")
    return one_line(text, MAX_MESSAGE_CHARACTERS) or type(error).__name__


def with_retries(
    action: Callable[[], T],
    should_retry: Callable[[Exception], bool] = is_transient,
    on_retry: Callable[[Exception, float], None] = lambda error, seconds: None,
) -> T:
    """Return what ``action`` returns, after at most `ATTEMPTS` attempts; else raise its last error.

    The client itself retries only transfers of blobs and listings: not commits, new repositories, or a
    snapshot's metadata.

    Args:
        on_retry: called with each error that is followed by another attempt, and the seconds until then.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except CLIENT_ERRORS as error:
            if not should_retry(error):
                raise
            wait = max(FIRST_WAIT * 2**attempt, _retry_after(error))
            on_retry(error, wait)
        time.sleep(wait)
    return action()


def _retry_after(error: Exception) -> float:
    """Return the seconds that the Hub asks to wait, at most `LONGEST_WAIT`."""
    headers = getattr(getattr(informative_cause(error), "response", None), "headers", {})
    seconds = headers.get("Retry-After") or ""
    return min(float(seconds), LONGEST_WAIT) if seconds.isdigit() else 0.0
