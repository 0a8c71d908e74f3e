"""One model answers the requests of many clients in turn: streaming, stop sequences and penalties.

Prompts are tokenized, images read and answers generated in separate thread pools, so that a bad request is
rejected at once and a slow image does not keep the model waiting. An error in one request does not affect
others.

Shapes: B answers, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.errors import UserError
from flamingo_ft.inference.decoding import Decoding
from flamingo_ft.inference.predictor import Predictor, seeded
from flamingo_ft.inference.streaming import TokenReceiver, VisibleText
from flamingo_ft.model.views import Views, stack_media

from .errors import GenerationError, RequestError
from .messages import ImageLink, MediaPolicy, open_link
from .requests import GenerationRequest, Sampling

MAX_TOKENS = 1024  # of an answer whose request sets no limit
READERS = 8  # images fetched and decoded at the same time
_log = logging.getLogger("uvicorn.error")


class Answer:
    """An answer in progress: its text piece by piece, then how it ended."""

    def __init__(self, prompt_tokens: int, loop: asyncio.AbstractEventLoop):
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: Literal["stop", "length"] = "length"
        self.cancelled = threading.Event()
        self._loop, self._pieces = loop, asyncio.Queue[str | None]()
        self._future: Future[None] | None = None

    def push(self, piece: str) -> None:
        """Hand a piece of text from the model's thread to the client's event loop."""
        if piece:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def follow(self, future: Future[None]) -> None:
        """Let the answer end when ``future``, its generation, does."""
        self._future = future
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._pieces.put_nowait, None))

    async def pieces(self) -> AsyncIterator[str]:
        """Iterate over the text as it grows. If the model fails, log the reason and raise GenerationError."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        assert self._future is not None, "pieces are only there once a generation is followed"
        error = None if self._future.cancelled() else self._future.exception()
        if error is not None:
            _log.error("an answer failed", exc_info=error)
            raise GenerationError

    def cancel(self) -> None:
        """End the answer at the next token, or before it begins: the client is gone."""
        self.cancelled.set()
        if self._future is not None:
            self._future.cancel()


class Engine:
    """A queue in front of a predictor. policy: where images may come from."""

    def __init__(self, predictor: Predictor, policy: MediaPolicy | None = None):
        self._predictor, self._processor = predictor, predictor.processor
        self._policy = policy or MediaPolicy()
        self._context = context_length(predictor.model.config)
        self._end_tokens = end_token_ids(predictor.model, self._processor)
        self._encoding = ThreadPoolExecutor(1, "encoding")  # tokenizers are not thread-safe
        self._reading = ThreadPoolExecutor(READERS, "reading")
        self._generating = ThreadPoolExecutor(1, "generating")
        self._open: set[Answer] = set()

    async def ask(self, request: GenerationRequest) -> Answer:
        """Queue a request behind earlier ones. Raise RequestError if it cannot be answered."""
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._encoding, self._encode, request)
        media = await loop.run_in_executor(self._reading, self._read, request.images)
        answer = Answer(len(ids), loop)
        future = self._generating.submit(self._generate, ids, media, request, answer)
        answer.follow(future)
        self._open.add(answer)
        future.add_done_callback(lambda _: self._open.discard(answer))
        return answer

    def close(self) -> None:
        """End all answers and threads, so that the process can exit."""
        for answer in list(self._open):
            answer.cancel()
        for pool in (self._encoding, self._reading, self._generating):
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, request: GenerationRequest) -> list[int]:
        """Return the token ids of the prompt. Raise RequestError if they leave no room for an answer."""
        field, ids = request.text_field, self._token_ids(request)
        self._check_bias(request.sampling)
        if not ids:
            raise RequestError("is empty; send some text", field)
        if len(ids) >= self._context:
            context = f"the model's context of {self._context} tokens"
            reason = f"{len(ids)} tokens leave no room for an answer in {context}; shorten the text"
            raise RequestError(reason, field, code="context_length_exceeded")
        return ids

    def _token_ids(self, request: GenerationRequest) -> list[int]:
        if request.prompt is not None:
            return self._processor.tokenizer(request.prompt)["input_ids"]
        try:
            return encode_prompt(self._processor, request.messages)
        except UserError as error:
            raise RequestError(str(error), request.text_field) from None

    def _check_bias(self, sampling: Sampling) -> None:
        embedding = self._predictor.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        size = len(embedding)
        unknown = [token for token in sampling.logit_bias if token >= size]
        if unknown:
            raise RequestError(f"the vocabulary has {size} tokens, got token {unknown[0]}", "logit_bias")

    def _read(self, links: list[ImageLink]) -> dict[str, Tensor]:
        """Return the images as model inputs, decoding one at a time."""
        views: Callable[..., Views] = self._processor.image_processor.views
        return stack_media([[views(open_link(link, self._policy)) for link in links]])

    def _generate(
        self, ids: list[int], media: dict[str, Tensor], request: GenerationRequest, answer: Answer
    ) -> None:
        sampling, predictor = request.sampling, self._predictor
        decoding = _decoding(sampling)
        text = VisibleText(sampling.stop, strip=request.prompt is None)
        receiver = TokenReceiver(
            self._processor.tokenizer, self._end_tokens, text, answer.push, answer.cancelled.is_set
        )
        if decoding.samples and decoding.seed is None:
            torch.seed()  # a new process would repeat what the last one answered
        try:
            with seeded(decoding):
                processors = penalties(sampling, len(ids))
                predictor.generate([ids], media, decoding, receiver, logits_processor=processors)
        finally:
            answer.completion_tokens = receiver.tokens
        receiver.finish()
        answer.finish_reason = "stop" if receiver.complete else "length"


def _decoding(sampling: Sampling) -> Decoding:
    """Return the options of ``generate``. OpenAI's API has neither beams nor top_k."""
    length = sampling.max_tokens or MAX_TOKENS
    if not sampling.temperature:
        return Decoding(length)
    return Decoding(length, temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed)


class Penalties(LogitsProcessor):
    """scores (B, V) - frequency_penalty * count - presence_penalty * (count > 0) + logit_bias.

    count: how often a token occurs in the answer; the prompt, the first ``prompt_tokens``, does not count.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int):
        self._sampling, self._prompt_tokens = sampling, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        ones = torch.ones_like(answer, dtype=scores.dtype)
        count = torch.zeros_like(scores).scatter_add_(1, answer, ones)
        scores = scores - self._sampling.frequency_penalty * count
        scores = scores - self._sampling.presence_penalty * (count > 0)
        for token, bias in self._sampling.logit_bias.items():
            scores[:, token] += bias
        return scores


def penalties(sampling: Sampling, prompt_tokens: int) -> LogitsProcessorList:
    """Return the processors that a request needs; none if it sets no penalty and no bias."""
    needed = sampling.frequency_penalty or sampling.presence_penalty or sampling.logit_bias
    return LogitsProcessorList([Penalties(sampling, prompt_tokens)] if needed else [])
