"""JSON bodies to `GenerationRequest`s: every field is honored, known to have no effect, or rejected."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flamingo_ft.inference.decoding import MIN_TEMPERATURE
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .errors import RequestError, shown
from .messages import MAX_KEY_CHARACTERS, ImageLink, read_messages

# Accepted without effect: they concern OpenAI's accounts and storage, not the answer.
NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
TEXT_FORMAT = {"type": "text"}

# Fields that this server does not support, with the values that have no effect and are therefore accepted.
Unsupported = Mapping[str, tuple[Any, ...]]
_IN_CHAT: Unsupported = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": (TEXT_FORMAT,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_IN_COMPLETIONS: Unsupported = {"n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)}
_IN_RESPONSES: Unsupported = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "text": ({}, {"format": TEXT_FORMAT}),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}

Tokens = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=16),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = dict[TokenId, Annotated[float, Field(ge=-100, le=100)]]


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated: greedily, unless the request sets a temperature or a top_p.

    max_tokens: None for the server's limit. stop: texts that end the answer and are not part of it.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """A dialogue to answer, in typed blocks with its images in order, or a text to continue (``prompt``)."""

    model: str | None
    sampling: Sampling
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[ImageLink] = field(default_factory=list)
    prompt: str | None = None
    stream: bool = False
    include_usage: bool = False

    @property
    def text_field(self) -> str:
        """The field to name in errors about the text as a whole."""
        return "messages" if self.prompt is None else "prompt"


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class _Fields(BaseModel):
    """Fields of all three kinds of request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class _TextFields(_Fields):
    max_tokens: Tokens | None = None
    stop: Stop = []
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Bias = {}


class _ChatFields(_TextFields):
    max_completion_tokens: Tokens | None = None


class _ResponseFields(_Fields):
    max_output_tokens: Tokens | None = None
    instructions: str | None = None


AnyFields = TypeVar("AnyFields", bound=_Fields)


def chat_request(body: Mapping[str, Any]) -> GenerationRequest:
    """Parse a body of ``/v1/chat/completions``. Raise RequestError for the first wrong field."""
    fields = _read_fields(body, _ChatFields, _IN_CHAT, "messages")
    limits = {fields.max_tokens, fields.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise RequestError("differs from max_tokens, got both; give one of them", "max_completion_tokens")
    messages, images = read_messages(body.get("messages"), "messages")
    sampling = _text_sampling(fields, next(iter(limits), None))
    return _request(fields, sampling, messages=messages, images=images)


def completion_request(body: Mapping[str, Any]) -> GenerationRequest:
    """Parse a body of ``/v1/completions``, which takes text only."""
    fields = _read_fields(body, _TextFields, _IN_COMPLETIONS, "prompt")
    prompt = body.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(f"must be one text that is not empty, got {shown(prompt)}", "prompt")
    if MEDIA_TOKEN in prompt:
        raise RequestError(
            f"got {MEDIA_TOKEN}, but no images are read here; use /v1/chat/completions", "prompt"
        )
    return _request(fields, _text_sampling(fields, fields.max_tokens), prompt=prompt)


def response_request(body: Mapping[str, Any]) -> GenerationRequest:
    """Parse a body of ``/v1/responses``."""
    fields = _read_fields(body, _ResponseFields, _IN_RESPONSES, "input")
    messages, images = _read_input(body.get("input"))
    if fields.instructions:
        instructions = {"role": "system", "content": [{"type": "text", "text": fields.instructions}]}
        messages = [instructions, *messages]
    return _request(fields, _sampling(fields, fields.max_output_tokens), messages=messages, images=images)


def _read_input(value: Any) -> tuple[list[dict[str, Any]], list[ImageLink]]:
    """Read the input: a text, the content blocks of one message, or messages."""
    if isinstance(value, str):
        return read_messages([{"role": "user", "content": value}], "input")
    if isinstance(value, list) and value and all(map(_is_input_block, value)):
        return read_messages([{"role": "user", "content": value}], "input")
    return read_messages(value, "input")


def _is_input_block(item: Any) -> bool:
    return isinstance(item, dict) and "role" not in item and str(item.get("type")).startswith("input_")


def _read_fields(
    body: Mapping[str, Any], schema: type[AnyFields], unsupported: Unsupported, text_field: str
) -> AnyFields:
    """Read all fields but ``text_field``. A null field counts as absent, as everywhere in OpenAI's API."""
    values = {name: value for name, value in body.items() if value is not None and name != text_field}
    known = {*schema.model_fields, *unsupported, *NO_EFFECT}
    for name, value in values.items():
        if name not in known:
            raise RequestError(
                f"unknown field; {_suggestion(name, {*known, text_field})}", name[:MAX_KEY_CHARACTERS]
            )
        if name in unsupported and not any(_same(value, allowed) for allowed in unsupported[name]):
            raise RequestError(_refusal(value, unsupported[name]), name)
    try:
        return schema.model_validate({name: values[name] for name in values if name in schema.model_fields})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
        raise RequestError(f"{reason}, got {shown(first['input'])}", _path(first["loc"])) from None


def _suggestion(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {near[0]}?" if near else "leave it out"


def _refusal(value: Any, allowed: tuple[Any, ...]) -> str:
    text = f"not supported by this server, got {shown(value)}; leave it out"
    plain = [shown(one) for one in allowed if not isinstance(one, (dict, list))]
    return f"{text} or send {' or '.join(plain)}" if plain else text


def _same(value: Any, allowed: Any) -> bool:
    """Whether two values are equal and of the same type; in Python, True equals 1."""
    return type(value) is type(allowed) and value == allowed


def _path(location: tuple[str | int, ...]) -> str:
    first, *rest = (step for step in location if step != "[key]")
    return str(first) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in rest)


def _text_sampling(fields: _TextFields, max_tokens: int | None) -> Sampling:
    return _sampling(
        fields,
        max_tokens,
        stop=tuple(fields.stop),
        frequency_penalty=fields.frequency_penalty,
        presence_penalty=fields.presence_penalty,
        logit_bias={int(token): bias for token, bias in fields.logit_bias.items()},
    )


def _sampling(fields: _Fields, max_tokens: int | None, **others: Any) -> Sampling:
    """Return the sampling; a top_p below 1 alone means sampling at OpenAI's default temperature, 1."""
    default = 1.0 if fields.top_p < 1 else 0.0
    temperature = default if fields.temperature is None else fields.temperature
    temperature = temperature if temperature >= MIN_TEMPERATURE else 0.0
    return Sampling(max_tokens, temperature, fields.top_p, fields.seed, **others)


def _request(fields: _Fields, sampling: Sampling, **text: Any) -> GenerationRequest:
    usage = fields.stream_options.include_usage
    return GenerationRequest(fields.model, sampling, stream=fields.stream, include_usage=usage, **text)
