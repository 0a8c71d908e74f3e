"""The text of an answer while its tokens are generated: stop strings, white space, cancelling."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

Piece = TypeVar("Piece")


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

    on_text: called with each piece of text. is_cancelled: whether to end at the next token. ids: the tokens
    so far, without an end token. tokens: their number, with it. complete: whether an end token or a stop
    sequence has come.

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
        self._tokenizer = tokenizer
        self._stream, self._passed_on = DecodeStream([], skip_special_tokens=True), ""
        self._end_tokens, self._text = end_tokens, text
        self._on_text, self._is_cancelled = on_text, is_cancelled
        self.ids: list[int] = []
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
            self.ids.append(token)
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
            self._passed_on += piece
            self._on_text(self._text.feed(piece))
        self.complete = is_end or self._text.stopped

    def finish(self) -> None:
        """Pass on what was held back, half a character or stop string, when generation has ended."""
        whole = cast(str, self._tokenizer.decode(self.ids, skip_special_tokens=True))
        if whole.startswith(self._passed_on):
            self._on_text(self._text.feed(whole[len(self._passed_on) :]))
        self._on_text(self._text.end())


class StopAtText(StoppingCriteria):
    """Ends each row of a batch once its answer contains one of ``stop_strings``; see `cut_at_stop`.

    prompt_tokens: length of the prompts, padding included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, stop_strings: Sequence[str]):
        self._tokenizer, self._prompt_tokens, self._stop_strings = tokenizer, prompt_tokens, stop_strings

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        answers = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :], skip_special_tokens=True)
        done = [any(stop in answer for stop in self._stop_strings) for answer in answers]
        return torch.tensor(done, device=input_ids.device)


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    return text[: min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=len(text))]


def stream_text(
    run: Callable[[Callable[[Piece], None], Callable[[], bool]], None],
) -> Generator[Piece]:
    """Call ``run(on_piece, is_cancelled)`` in a thread and yield the pieces that it passes on.

    An exception in it is raised here after the pieces before it. Closing the generator cancels it and waits
    for its end.
    """
    pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
    cancelled = threading.Event()
    with ThreadPoolExecutor(1, "generating") as pool:
        future = pool.submit(run, pieces.put, cancelled.is_set)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
            future.result()
        finally:
            cancelled.set()
