"""The routes of an OpenAI-compatible API. Every error is reported as an OpenAI error object."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .engine import Answer, Engine
from .errors import GenerationError, RequestError, error_body, shown
from .replies import ChatReply, CompletionReply, Reply, ResponseReply
from .requests import GenerationRequest, chat_request, completion_request, response_request

REQUEST_ID = "x-request-id"
CONNECTION_CHECK_SECONDS = 0.5  # between checks whether the client is still connected
# Read up to this multiple of the body limit: a client that is still sending would not see the error.
MAX_DRAINED = 4
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Api:
    """The handlers of the routes. name: what clients call the model. max_body: of a request, in bytes."""

    engine: Engine
    name: str
    max_body: int

    def generation(
        self, read: Callable[[dict[str, Any]], GenerationRequest], make_reply: type[Reply]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that parses requests with ``read`` and writes replies with ``make_reply``."""

        async def handle(request: Request) -> Response:
            generation = read(await read_body(request, self.max_body))
            self._check_model(generation.model)
            answer = await self.engine.ask(generation)
            reply = make_reply(self.name, generation.include_usage)
            headers = {REQUEST_ID: request.headers.get(REQUEST_ID, reply.id)}
            if generation.stream:
                events = _events(answer, reply)
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            return JSONResponse(reply.whole(await _whole_text(request, answer), answer), headers=headers)

        return handle

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _model_object(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "flamingo_ft"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            reason = f"this server has only {shown(self.name)}, got {shown(name)}"
            raise RequestError(reason, "model", status=404, code="model_not_found")


def build_app(engine: Engine, name: str, max_body: int) -> Starlette:
    """Return the application that a web server runs; see `Api`."""
    api = Api(engine, name, max_body)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        engine.close()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.generation(chat_request, ChatReply), methods=["POST"]),
            Route("/v1/completions", api.generation(completion_request, CompletionReply), methods=["POST"]),
            Route("/v1/responses", api.generation(response_request, ResponseReply), methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/health", api.health),
        ],
        exception_handlers={
            RequestError: _request_error,
            GenerationError: _generation_error,
            HTTPException: _http_error,
            Exception: _generation_error,
        },
        lifespan=lifespan,
    )


async def _whole_text(request: Request, answer: Answer) -> str:
    """Return the whole answer, ending it early if the client disconnects."""
    watching = asyncio.create_task(_cancel_when_disconnected(request, answer))
    try:
        return "".join([piece async for piece in answer.pieces()])
    finally:
        watching.cancel()


async def _cancel_when_disconnected(request: Request, answer: Answer) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(CONNECTION_CHECK_SECONDS)
    answer.cancel()


async def _events(answer: Answer, reply: Reply) -> AsyncIterator[str]:
    """Write the reply as server-sent events. After the first event, an error can only be another event."""
    pieces = []
    try:
        yield reply.opening()
        async for piece in answer.pieces():
            pieces.append(piece)
            yield reply.piece(piece)
        yield reply.closing("".join(pieces), answer)
    except GenerationError as error:
        yield reply.failure(error)
    finally:
        answer.cancel()


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status)


async def _generation_error(request: Request, error: Exception) -> Response:
    return JSONResponse(GenerationError().body(), 500)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "POST /v1/chat/completions, /v1/completions and /v1/responses"
    message = f"{request.method} {shown(request.url.path)}: {error.detail}; this server has {routes}"
    return JSONResponse(
        error_body(message, "invalid_request_error"), error.status_code, headers=error.headers
    )


async def read_body(request: Request, limit: int) -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises RequestError (413) for a body of more than ``limit`` bytes, however it is sent, and (400) if it is
    not a JSON object.
    """
    content, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            content += chunk
        elif size > MAX_DRAINED * limit:
            break
    if size > limit:
        reason = f"the body is larger than {limit / 2**20:g} MiB, the limit of this server (--max-body-mib)"
        raise RequestError(f"{reason}; send fewer or smaller images", status=413, code="request_too_large")
    return await asyncio.to_thread(_parse, bytes(content))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
