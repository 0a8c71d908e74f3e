"""Errors that a client receives, as OpenAI's error objects."""

from __future__ import annotations

import json
from typing import Any

MAX_SHOWN_CHARACTERS = 60


class RequestError(Exception):
    """A request that cannot be answered. param: the field at fault; the message begins with it."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(f"{param}: {message}" if param else message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the JSON for the client."""
        return error_body(str(self), "invalid_request_error", self.param, self.code)


class GenerationError(Exception):
    """The model failed while answering a valid request."""

    MESSAGE = "the server failed while generating the answer; its log has the details"

    def __init__(self) -> None:
        super().__init__(self.MESSAGE)

    def body(self) -> dict[str, Any]:
        """Return the JSON for the client, which says nothing about the machine."""
        return error_body(self.MESSAGE, "server_error")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(value: Any) -> str:
    """Return a value of the request on one short line; a message must not repeat a whole image."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, str):
        value = value[: MAX_SHOWN_CHARACTERS + 1]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
