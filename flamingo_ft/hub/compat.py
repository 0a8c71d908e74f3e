"""Private names of huggingface_hub that the package needs, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub.utils import _http

ClientFactory = Callable[[], Any]  # makes the client's HTTP session


def client_factory() -> ClientFactory:
    """What makes the client's HTTP session. The client has a setter for it and no getter, and whoever replaces it for a
    while has to put back what a user set."""
    return _http._GLOBAL_CLIENT_FACTORY


def replace_client_factory(factory: ClientFactory) -> None:
    """Set what makes later sessions. The client's own setter closes the session that other threads are using."""
    _http._GLOBAL_CLIENT_FACTORY = factory
