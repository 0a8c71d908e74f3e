"""The routes: an OpenAI-compatible API, with an OpenAI error object for whatever goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .body import read_object
from .engine import Answer, Engine
from .errors import AnswerFailed, RequestError, error_body, shown
from .replies import ChatReply, CompletionReply, Reply, ResponseReply
from .requests import GenerationRequest, chat_request, completion_request, response_request

REQUEST_ID = "x-request-id"
GONE_SECONDS = 0.5  # between checks whether the client is still connected


@dataclass(frozen=True)
class Api:
    """The routes' handlers. name: what clients call the model; max_body: of a request, in bytes."""

    engine: Engine
    name: str
    max_body: int

    def answering(
        self, read: Callable[[dict[str, Any]], GenerationRequest], reply: type[Reply]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler of requests that ``read`` understands and ``reply`` answers."""

        async def handle(request: Request) -> Response:
            generation = read(await read_object(request, self.max_body))
            self._check_model(generation.model)
            answer = await self.engine.ask(generation)
            form = reply(self.name, generation.include_usage)
            headers = {REQUEST_ID: request.headers.get(REQUEST_ID, form.number)}
            if generation.stream:
                return StreamingResponse(
                    _events(answer, form), media_type="text/event-stream", headers=headers
                )
            return JSONResponse(form.whole(await _whole_text(request, answer), answer), headers=headers)

        return handle

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "flamingo_ft"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            reason = f"this server has {shown(self.name)} alone, got {shown(name)}"
            raise RequestError(reason, "model", status=404, code="model_not_found")


def build_app(engine: Engine, name: str, max_body: int) -> Starlette:
    """The application that a web server runs; see `Api`."""
    api = Api(engine, name, max_body)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.answering(chat_request, ChatReply), methods=["POST"]),
            Route("/v1/completions", api.answering(completion_request, CompletionReply), methods=["POST"]),
            Route("/v1/responses", api.answering(response_request, ResponseReply), methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/health", api.health),
        ],
        exception_handlers={
            RequestError: _request_error,
            AnswerFailed: _answer_failed,
            HTTPException: _http_error,
            Exception: _answer_failed,
        },
        lifespan=lifespan,
    )


async def _whole_text(request: Request, answer: Answer) -> str:
    """The whole answer, which ends early when the client is gone."""
    watching = asyncio.create_task(_cancel_when_gone(request, answer))
    try:
        return "".join([piece async for piece in answer.pieces()])
    finally:
        watching.cancel()


async def _cancel_when_gone(request: Request, answer: Answer) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(GONE_SECONDS)
    answer.cancel()


async def _events(answer: Answer, form: Reply) -> AsyncIterator[str]:
    """The reply as events. Once they have begun, an error can only be one of them."""
    said = []
    try:
        yield form.opening()
        async for piece in answer.pieces():
            said.append(piece)
            yield form.piece(piece)
        yield form.closing("".join(said), answer)
    except AnswerFailed as error:
        yield form.failure(error)
    finally:
        answer.cancel()


async def _request_error(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.body(), error.status)


async def _answer_failed(request: Request, error: Exception) -> Response:
    return JSONResponse(AnswerFailed().body(), 500)


async def _http_error(request: Request, error: HTTPException) -> Response:
    routes = "POST /v1/chat/completions, /v1/completions and /v1/responses"
    message = f"{request.method} {shown(request.url.path)}: {error.detail}; this server has {routes}"
    return JSONResponse(
        error_body(message, "invalid_request_error"), error.status_code, headers=error.headers
    )
