"""How the client is used: no waiting for ever, and no bars where there are others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import close_session, get_session
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .compat import client_factory, replace_client_factory

SILENCE = 120.0  # seconds without a byte, after which a connection counts as lost


@contextmanager
def silence_ends() -> Iterator[None]:
    """Limit the client's waiting for a Hub that falls silent, as one does behind a network that is gone.

    Only limits that are not set are changed, and they are put back afterwards. All else that a user set stays: the
    session itself (proxy, certificates, headers), and the factory that makes the next one after a connection failed.
    """
    usual, session = client_factory(), get_session()
    timeout = session.timeout

    def limited_client() -> Any:
        client = usual()
        client.timeout = _limited(client.timeout)
        return client

    session.timeout = _limited(timeout)
    replace_client_factory(limited_client)
    try:
        yield
    finally:
        session.timeout = timeout
        if client_factory() is limited_client:  # not where the block set another
            replace_client_factory(usual)
            if get_session() is not session:  # a limited one: the next is the user's own again
                close_session()


def _limited(timeout: Any) -> Any:
    """A client's timeouts with `SILENCE` for each that it does not have."""
    seconds = {kind: SILENCE if value is None else value for kind, value in timeout.as_dict().items()}
    return type(timeout)(**seconds)


@contextmanager
def without_bars() -> Iterator[None]:
    """The client's own progress bars would run through others."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
