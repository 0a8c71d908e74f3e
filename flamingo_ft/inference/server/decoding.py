"""What happens at every generated token: penalties and biases before it is chosen, stop texts after it.

Shapes: B answers, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria

from .requests import Sampling


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
    """Filters a growing answer: drops everything from a stop text on, and white space at both ends.

    Text that may be the beginning of a stop text is held back until the next piece decides. strip: whether to
    drop outer white space, as `flamingo-ft generate` does.
    """

    def __init__(self, stop: Sequence[str] = (), strip: bool = True):
        self._stop, self._strip = tuple(stop), strip
        self._pending = ""  # may be the beginning of a stop text
        self._blank = ""  # white space that counts only if text follows
        self._begun = not strip
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Return what can be shown after ``piece``; nothing more after a stop text."""
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
        """Return what was held back, if the answer ends without a stop text."""
        text, self._pending = self._pending, ""
        return self._stripped(text)

    def _held_back(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that a stop text begins with."""
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
    an end token or a stop text has come.

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
