"""Private names of huggingface_hub that the package needs, each with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from inspect import getmodule
from typing import Any

from huggingface_hub import _snapshot_download
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


@contextmanager
def no_warning_of_unmatched_patterns() -> Generator[None]:
    """Silence the client's warning that a repository has no file of the requested names.

    The package asks for one format of weights after the other. The client logs it without a category, beside
    warnings that a user should see, such as those of interrupted downloads.
    """
    logger = _snapshot_download.logger

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
