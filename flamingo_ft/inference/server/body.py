"""The JSON object in the body of a request, no larger than allowed."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import Request

from .errors import RequestError

DRAINED = 4  # times the limit: a client that is still sending sees no reply
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """The object. Raises RequestError (413) for a body of more than ``limit`` bytes, however it is sent, and (400) for
    one that is not a JSON object."""
    content, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            content += chunk
        elif size > DRAINED * limit:
            break
    if size > limit:
        reason = f"the body is larger than {limit / 2**20:g} MiB, the limit of this server (--max-body-mib)"
        raise RequestError(f"{reason}; send fewer or smaller images", status=413, code="request_too_large")
    return await asyncio.to_thread(_parse, bytes(content))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content, parse_constant=_no_number)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(
            "the body has half of a surrogate pair, which is not text; send valid Unicode"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
