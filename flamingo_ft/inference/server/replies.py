"""Replies of OpenAI's three APIs: one JSON object, or server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .engine import Answer
from .errors import GenerationError

DONE = "data: [DONE]\n\n"
_INCOMPLETE = {"reason": "max_output_tokens"}


class Reply(Protocol):
    """The reply to one request."""

    id: str

    def __init__(self, model: str, include_usage: bool = False): ...

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """Return the reply as one JSON object."""
        ...

    def opening(self) -> str:
        """Return the events before the text."""
        ...

    def piece(self, text: str) -> str:
        """Return the event of a piece of text."""
        ...

    def closing(self, text: str, answer: Answer) -> str:
        """Return the events after the text."""
        ...

    def failure(self, error: GenerationError) -> str:
        """Return the events that end an answer if the model failed."""
        ...


@dataclass
class _ReplyHeader:
    model: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


class _ChoicesReply(_ReplyHeader):
    """What chat completions and completions share: one choice, and one kind of event."""

    prefix: str
    kind: str
    chunk_kind: str

    def _choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        return self._body(self.kind, [self._choice(text, answer.finish_reason)], usage=_usage(answer))

    def piece(self, text: str) -> str:
        return self._event([self._delta(text)])

    def closing(self, text: str, answer: Answer) -> str:
        end = self._event([self._delta(None, answer.finish_reason)])
        usage = _sse(self._body(self.chunk_kind, [], usage=_usage(answer))) if self.include_usage else ""
        return end + usage + DONE

    def failure(self, error: GenerationError) -> str:
        return _sse(error.body()) + DONE

    def _event(self, choices: list[dict[str, Any]]) -> str:
        return _sse(self._body(self.chunk_kind, choices, **({"usage": None} if self.include_usage else {})))

    def _body(self, kind: str, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **others,
        }


class ChatReply(_ChoicesReply):
    """Reply of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> str:
        return self._event(
            [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        )

    def _choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
        return {
            "index": 0,
            "delta": {} if text is None else {"content": text},
            "finish_reason": finish_reason,
        }


class CompletionReply(_ChoicesReply):
    """Reply of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self) -> str:
        return ""

    def _choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish_reason}


@dataclass
class ResponseReply(_ReplyHeader):
    """Reply of ``/v1/responses``: one message with one text; events are numbered."""

    sent: int = 0

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        return self._response(_status(answer), [self._message(text, _status(answer))], answer)

    def opening(self) -> str:
        response = self._response("in_progress", [])
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event(
                "response.output_item.added", output_index=0, item=self._message(None, "in_progress")
            )
            + self._event("response.content_part.added", **self._position(), part=_text(""))
        )

    def piece(self, text: str) -> str:
        return self._event("response.output_text.delta", **self._position(), delta=text, logprobs=[])

    def closing(self, text: str, answer: Answer) -> str:
        status = _status(answer)
        return (
            self._event("response.output_text.done", **self._position(), text=text, logprobs=[])
            + self._event("response.content_part.done", **self._position(), part=_text(text))
            + self._event("response.output_item.done", output_index=0, item=self._message(text, status))
            + self._event(f"response.{status}", response=self.whole(text, answer))
        )

    def failure(self, error: GenerationError) -> str:
        reason = {"code": "server_error", "message": str(error)}
        failed = {**self._response("failed", []), "error": reason}
        return self._event("error", **reason, param=None) + self._event("response.failed", response=failed)

    def _event(self, kind: str, **content: Any) -> str:
        self.sent += 1
        return f"event: {kind}\n" + _sse({"type": kind, "sequence_number": self.sent - 1, **content})

    def _position(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_text(text)]
        message = {"id": f"msg_{self.id}", "type": "message", "role": "assistant"}
        return {**message, "status": status, "content": content}

    def _response(
        self, status: str, output: list[dict[str, Any]], answer: Answer | None = None
    ) -> dict[str, Any]:
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "error": None,
            "incomplete_details": _INCOMPLETE if status == "incomplete" else None,
            "output": output,
            "usage": None if answer is None else _response_usage(answer),
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
        }


def _status(answer: Answer) -> str:
    return "completed" if answer.finish_reason == "stop" else "incomplete"


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _response_usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _sse(content: Mapping[str, Any]) -> str:
    """Return one event. A line break would end it; JSON on one line has none."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
