"""How the client is used: no waiting for ever, and no bars where there are others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

SILENCE = 120.0  # seconds without a byte, after which a connection counts as lost


@contextmanager
def silence_ends() -> Iterator[None]:
    """The client waits for ever for a Hub that falls silent, as one does behind a network that is gone; not here."""
    usual = get_session()

    def client(timeout: object) -> object:
        return type(usual)(event_hooks=usual.event_hooks, follow_redirects=True, timeout=timeout)

    set_client_factory(partial(client, SILENCE))
    try:
        yield
    finally:
        set_client_factory(partial(client, usual.timeout))


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
