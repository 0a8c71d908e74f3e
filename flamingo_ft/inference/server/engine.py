"""One model that answers the requests of many clients, one after the other.

Text is encoded on one thread and answered on another, so that a request that cannot be answered is rejected at once and
no slow image keeps the model waiting. What a request breaks stays its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.data.collate import pad_ids, stack_media
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .errors import AnswerFailed, RequestError
from .images import ImageLink, MediaPolicy, open_link
from .requests import GenerationRequest, Sampling
from .steering import steer
from .visible import VisibleText

MAX_TOKENS = 1024  # of an answer whose request sets no limit
READERS = 8  # images fetched and decoded at once
_log = logging.getLogger("uvicorn.error")


class Answer:
    """An answer on its way: its text piece by piece, then how it ended."""

    def __init__(self, prompt_tokens: int, loop: asyncio.AbstractEventLoop):
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: Literal["stop", "length"] = "length"
        self.cancelled = threading.Event()
        self._loop, self._pieces = loop, asyncio.Queue[str | None]()
        self._future: Future[None] | None = None

    def push(self, piece: str) -> None:
        """Hand a piece of text to the client's side, from the model's thread."""
        if piece:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def follow(self, future: Future[None]) -> None:
        """The answer ends when ``future`` does."""
        self._future = future
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._pieces.put_nowait, None))

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it grows. Raises AnswerFailed when the model does; the log gets the reason."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        error = None if self._future.cancelled() else self._future.exception()
        if error is not None:
            _log.error("an answer failed", exc_info=error)
            raise AnswerFailed

    def cancel(self) -> None:
        """Nobody is listening: end it at the next token, or before the first."""
        self.cancelled.set()
        self._future.cancel()


class _TokenReceiver(StoppingCriteria):
    """Receives each token that the model chooses, passes its text on, and ends generation when the answer is complete.

    A stopping criterion rather than a streamer: it decides in the same step as it sees the token, in every release of
    transformers. It may be called once more after the end.
    """

    def __init__(
        self, answer: Answer, tokenizer: PreTrainedTokenizerBase, ends: list[int], text: VisibleText
    ):
        self._answer, self._ends, self._text = answer, ends, text
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoding = DecodeStream([], skip_special_tokens=True)
        self.complete = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if not self.complete and not self._answer.cancelled.is_set():
            self._receive(int(input_ids[0, -1]))
        done = self.complete or self._answer.cancelled.is_set()
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)

    def _receive(self, token: int) -> None:
        self._answer.completion_tokens += 1
        if token not in self._ends:
            self._answer.push(self._text.feed(self._decoding.step(self._tokenizer, token) or ""))
        self.complete = self._text.stopped or token in self._ends

    def finish(self) -> None:
        """The model has no more to say, or no more room."""
        self._answer.push(self._text.end())
        self._answer.finish_reason = "stop" if self.complete else "length"


class Engine:
    """A model and its processor behind `ask`. policy: where images may come from."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        policy: MediaPolicy | None = None,
    ):
        self._model, self._processor, self._policy = model, processor, policy or MediaPolicy()
        self._context = context_length(model.config)
        self._ends = end_token_ids(model, processor)
        self._encoding = ThreadPoolExecutor(1, "encoding")  # a tokenizer is not made for two threads
        self._reading = ThreadPoolExecutor(READERS, "reading")
        self._answering = ThreadPoolExecutor(1, "answering")
        self._open: set[Answer] = set()

    async def ask(self, request: GenerationRequest) -> Answer:
        """The answer, queued behind earlier ones. Raises RequestError for what cannot be answered."""
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._encoding, self._encode, request)
        media = await loop.run_in_executor(self._reading, self._read, request.images)
        answer = Answer(len(ids), loop)
        future = self._answering.submit(self._generate, ids, media, request, answer)
        answer.follow(future)
        self._open.add(answer)
        future.add_done_callback(lambda _: self._open.discard(answer))
        return answer

    def close(self) -> None:
        """End all answers, so that the process can."""
        for answer in list(self._open):
            answer.cancel()
        for pool in (self._encoding, self._reading, self._answering):
            pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of the text up to the answer, which has to have room in the context."""
        field, ids = request.text_field, self._ids(request)
        self._check_bias(request.sampling)
        if not ids:
            raise RequestError("has no tokens; give a text that is not empty", field)
        if len(ids) >= self._context:
            reason = f"{len(ids)} tokens leave no room for an answer in the model's context of {self._context} tokens"
            raise RequestError(f"{reason}; shorten the text", field, code="context_length_exceeded")
        return ids

    def _ids(self, request: GenerationRequest) -> list[int]:
        if request.prompt is not None:
            return self._processor.tokenizer(request.prompt)["input_ids"]
        try:
            return encode_prompt(self._processor, request.messages)
        except UserError as error:
            raise RequestError(str(error), request.text_field) from None

    def _check_bias(self, sampling: Sampling) -> None:
        size = len(self._model.get_input_embeddings().weight)
        if beyond := [token for token in sampling.logit_bias if token >= size]:
            raise RequestError(f"the vocabulary has {size} tokens, got token {beyond[0]}", "logit_bias")

    def _read(self, links: list[ImageLink]) -> dict[str, Tensor]:
        """The images as the tower takes them, one decoded at a time."""
        transform: Callable[..., Tensor] = self._processor.image_processor.transform
        return stack_media([[transform(open_link(link, self._policy)).unsqueeze(0) for link in links]])

    @torch.no_grad()
    def _generate(
        self, ids: list[int], media: dict[str, Tensor], request: GenerationRequest, answer: Answer
    ) -> None:
        sampling, tokenizer = request.sampling, self._processor.tokenizer
        text = VisibleText(sampling.stop, strip=request.prompt is None)
        receiver = _TokenReceiver(answer, tokenizer, self._ends, text)
        batch = pad_ids([ids], tokenizer.pad_token_id, "left") | media
        if sampling.temperature:
            # Sampling without a seed must not repeat what an earlier request's seed led to.
            torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
        self._model.generate(
            **{name: tensor.to(self._model.device) for name, tensor in batch.items()},
            max_new_tokens=min(sampling.max_tokens or MAX_TOKENS, self._context - len(ids)),
            eos_token_id=self._ends or None,
            pad_token_id=tokenizer.pad_token_id,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([receiver]),
            logits_processor=steer(sampling, len(ids)),
            **_choosing(sampling),
        )
        receiver.finish()


def _choosing(sampling: Sampling) -> dict[str, Any]:
    """Options of ``generate``; top_k 0 is off, as OpenAI's API has none."""
    if not sampling.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
