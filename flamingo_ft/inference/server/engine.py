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
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.data.collate import pad_ids, stack_media
from flamingo_ft.data.encode import encode_prompt
from flamingo_ft.errors import UserError
from flamingo_ft.inference.predictor import Predictor

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
        self._model, self._processor = predictor.model, predictor.processor
        self._policy = policy or MediaPolicy()
        self._context = context_length(self._model.config)
        self._end_tokens = end_token_ids(self._model, self._processor)
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
        embedding = self._model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        size = len(embedding)
        unknown = [token for token in sampling.logit_bias if token >= size]
        if unknown:
            raise RequestError(f"the vocabulary has {size} tokens, got token {unknown[0]}", "logit_bias")

    def _read(self, links: list[ImageLink]) -> dict[str, Tensor]:
        """Return the images as model inputs, decoding one at a time."""
        transform: Callable[..., Tensor] = self._processor.image_processor.transform
        return stack_media([[transform(open_link(link, self._policy)).unsqueeze(0) for link in links]])

    @torch.no_grad()
    def _generate(
        self, ids: list[int], media: dict[str, Tensor], request: GenerationRequest, answer: Answer
    ) -> None:
        sampling, tokenizer = request.sampling, self._processor.tokenizer
        text = VisibleText(sampling.stop, strip=request.prompt is None)
        receiver = TokenReceiver(tokenizer, self._end_tokens, text, answer.push, answer.cancelled.is_set)
        batch: dict[str, Any] = pad_ids([ids], tokenizer.pad_token_id, "left") | media
        if sampling.temperature:
            # Without a seed, sampling must not repeat what an earlier request's seed led to.
            torch.seed() if sampling.seed is None else torch.manual_seed(sampling.seed)
        try:
            self._model.generate(
                **{name: tensor.to(self._model.device) for name, tensor in batch.items()},
                max_new_tokens=min(sampling.max_tokens or MAX_TOKENS, self._context - len(ids)),
                eos_token_id=self._end_tokens or None,
                pad_token_id=tokenizer.pad_token_id,
                num_beams=1,
                stopping_criteria=StoppingCriteriaList([receiver]),
                logits_processor=penalties(sampling, len(ids)),
                **_sampling_options(sampling),
            )
        finally:
            answer.completion_tokens = receiver.tokens
        receiver.finish()
        answer.finish_reason = "stop" if receiver.complete else "length"


def _sampling_options(sampling: Sampling) -> dict[str, Any]:
    """Return options of ``generate``. OpenAI's API has no top_k; 0 turns it off."""
    if not sampling.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


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


class VisibleText:
    """Filters a growing answer: drops everything from a stop sequence on, and white space at both ends.

    Text that may be the beginning of a stop sequence is held back until the next piece decides.
    strip: whether to drop outer white space, as `flamingo-ft generate` does.
    """

    def __init__(self, stop: Sequence[str] = (), strip: bool = True):
        self._stop, self._strip = tuple(stop), strip
        self._pending = ""  # may be the beginning of a stop sequence
        self._blank = ""  # white space that counts only if text follows
        self._begun = not strip
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Return what can be shown after ``piece``; nothing more after a stop sequence."""
        if self.stopped:
            return ""
        text = self._pending + piece
        positions = [position for position in map(text.find, self._stop) if position >= 0]
        if positions:
            self.stopped, self._pending = True, ""
            return self._stripped(text[: min(positions)])
        end = len(text) - self._held_back(text)
        self._pending = text[end:]
        return self._stripped(text[:end])

    def end(self) -> str:
        """Return what was held back, if the answer ends without a stop sequence."""
        text, self._pending = self._pending, ""
        return self._stripped(text)

    def _held_back(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that a stop sequence begins with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _stripped(self, text: str) -> str:
        if not self._strip:
            return text
        text = self._blank + (text if self._begun else text.lstrip())
        shown = text.rstrip()
        self._begun = self._begun or bool(shown)
        self._blank = text[len(shown) :]
        return shown


class TokenReceiver(StoppingCriteria):
    """Decodes each generated token, passes visible text on, and ends generation when the answer is complete.

    on_text: called with each piece of text. is_cancelled: whether to end at the next token. complete: whether
    an end token or a stop sequence has come.

    A stopping criterion rather than a streamer, because it can end generation in the same step as it sees the
    token, in every release of transformers. It may be called once more after the end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        text: VisibleText,
        on_text: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ):
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._end_tokens, self._text = end_tokens, text
        self._on_text, self._is_cancelled = on_text, is_cancelled
        self.tokens = 0
        self.complete = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if not self.complete and not self._is_cancelled():
            self._receive(int(input_ids[0, -1]))
        done = self.complete or self._is_cancelled()
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)

    def _receive(self, token: int) -> None:
        self.tokens += 1
        is_end = token in self._end_tokens
        if not is_end:
            self._on_text(self._text.feed(self._stream.step(self._tokenizer, token) or ""))
        self.complete = is_end or self._text.stopped

    def finish(self) -> None:
        """Pass on what was held back, when generation has ended."""
        self._on_text(self._text.end())
