"""Private names of huggingface_hub that the package needs, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getmodule
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http

ClientFactory = Callable[[], Any]  # creates the client's HTTP session

# The HTTP library of the client, which differs between its versions; requests without an answer raise its
# errors.
http_library: Any = getmodule(HfHubHTTPError.__bases__[0])


def client_factory() -> ClientFactory:
    """Return the factory of the client's HTTP sessions.

    The client has a setter for it and no getter; whoever replaces it for a while must restore what a user
    set.
    """
    return _http._GLOBAL_CLIENT_FACTORY


def replace_client_factory(factory: ClientFactory) -> None:
    """Set the factory of later sessions; the client's own setter closes the session of other threads."""
    _http._GLOBAL_CLIENT_FACTORY = factory
