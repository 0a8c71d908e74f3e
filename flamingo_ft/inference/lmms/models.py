"""The classes that lmms-eval makes from ``--model flamingo_ft``; they answer through a `Predictor`.

    python -m lmms_eval --model flamingo_ft --model_args pretrained=runs/quickstart --tasks mme --batch_size 8

A request's ``args`` differ by class, and lmms-eval's names are kept for what is in them: ``doc`` is a row of
the task's data, ``doc_id`` its index.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult  # pyrefly: ignore[missing-import]
from lmms_eval.api.model import lmms  # pyrefly: ignore[missing-import]
from lmms_eval.protocol import ChatMessages  # pyrefly: ignore[missing-import]

from flamingo_ft.errors import UserError
from flamingo_ft.inference.batch import BATCHES_PER_WINDOW
from flamingo_ft.inference.decoding import Decoding
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.inference.prompts import Prompt
from flamingo_ft.progress import progress_bars

from .requests import READ, chat_prompt, decoding_options, simple_prompt

_log = logging.getLogger(__name__)

Round = tuple[Prompt | None, list[str], Any]  # what to ask, the answers so far, and the task's own state


class _Flamingo(lmms):
    """What both classes share: a model that is loaded once, and requests answered in batches.

    pretrained: an adapter or a merged model, a folder or ``org/name``. batch_size: requests answered
    together. quantization, dtype: see `Predictor.from_pretrained`. max_new_tokens: most tokens of an answer;
    a task may set fewer. device, max_batch_size: what lmms-eval passes for its options of these names; the
    model is on this process's GPU if there is one, and batches have one size.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        quantization: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._longest = max_new_tokens
        self._ignored: set[str] = set()  # generation_kwargs that were logged as being without effect
        size = _to_batch_size(batch_size)
        self.predictor = Predictor.from_pretrained(
            pretrained, quantization=quantization, dtype=dtype, batch_size=size
        )
        self.device = self.predictor.model.device
        if device is not None and not str(self.device).startswith(device):
            raise UserError(
                f"device: the model is on {self.device}, got {device}; choose the GPU, or none, with "
                "CUDA_VISIBLE_DEVICES"
            )

    def clean(self) -> None:
        """Free the model, before a judge is loaded."""
        del self.predictor
        super().clean()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answer to each request, in their order."""
        answers = [""] * len(requests)
        alike: dict[Decoding, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[self._decoding(request.args)].append(number)
        with self._bar(len(requests)) as advance:
            for decoding, numbers in alike.items():
                for window in self._windows(numbers):
                    prompts = [self._prompt(requests[number].args) for number in window]
                    texts = self.predictor.answer(prompts, on_batch=advance, **vars(decoding))
                    for number, text in zip(window, texts, strict=True):
                        answers[number] = text
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Return the answers of all rounds of each request, whose task says what each round asks."""
        with self._bar(len(requests)) as advance:
            answers = []
            for request in requests:
                answers.append(self._rounds(request.args))
                advance(1)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Return the loss of each request's answer, and whether it is what greedy decoding answers.

        The loss is in nats per token, the end of the answer included. lmms-eval takes the choice with the
        smallest, as its own models return a loss here, not a log-likelihood. Each pair is the ``text`` of a
        GenerationResult, because lmms-eval 0.7.3 would turn a bare pair into a string.
        """
        results: list[Any] = []
        with self._bar(len(requests)) as advance:
            for window in self._windows(range(len(requests))):
                prompts, answers = zip(*(self._pair(requests[number].args) for number in window), strict=True)
                scores = self.predictor.score(prompts, answers, on_batch=advance)
                pairs = [(-score.log_likelihood / score.tokens, score.is_greedy) for score in scores]
                results += map(GenerationResult, pairs)
        return results

    @abstractmethod
    def _options(self, args: tuple) -> dict[str, Any]:
        """Return the task's ``generation_kwargs`` in a generation request."""

    @abstractmethod
    def _prompt(self, args: tuple) -> Prompt:
        """Return the prompt of a ``generate_until`` request."""

    @abstractmethod
    def _round(self, args: tuple, number: int, answers: list[str], state: Any) -> Round:
        """Return what round ``number`` of a multi-round request asks; no prompt after the last round."""

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _pair(self, args: tuple) -> tuple[Prompt, str]:
        """Return the prompt of a log-likelihood request, and its answer.

        The answer comes with the delimiter that would separate it from a plain text, which the chat template
        has its own characters for.
        """
        text, answer, doc_to_visual, doc_id, task, split = args
        doc = self._doc(task, split, doc_id)
        if callable(answer):
            answer = answer(doc)
        return simple_prompt(text, doc_to_visual(doc), _where(task, split, doc_id)), answer.strip()

    def _decoding(self, args: tuple) -> Decoding:
        options = self._options(args)
        for name in options.keys() - READ - self._ignored:
            _log.warning("generation_kwargs: %s has no effect on this model", name)
            self._ignored.add(name)
        return self.predictor.decoding.updated(**decoding_options(options, self._longest))

    def _rounds(self, args: tuple) -> list[str]:
        decoding = self._decoding(args)
        answers: list[str] = []
        state = None
        for number in count():
            prompt, answers, state = self._round(args, number, answers, state)
            if prompt is None:
                break
            answers = [*answers, *self.predictor.answer([prompt], **vars(decoding))]
        return answers

    def _windows(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield a few batches of requests at a time, so that not all images are in memory at once."""
        size = self.predictor.batch_size * BATCHES_PER_WINDOW
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]

    @contextmanager
    def _bar(self, total: int) -> Generator[Callable[[int], None]]:
        """Show progress, and yield the function that advances it."""
        with progress_bars(stderr=True, disable=self.rank != 0) as bars:
            task = bars.add_task("answering", total=total, note="")
            yield lambda done: bars.advance(task, done)


class ChatFlamingo(_Flamingo):
    """Answers chat messages. ``args``: text, doc_to_messages, generation_kwargs, doc_id, task, split."""

    is_simple = False

    def _options(self, args: tuple) -> dict[str, Any]:
        return args[2]

    def _prompt(self, args: tuple) -> Prompt:
        _, doc_to_messages, _, doc_id, task, split = args
        messages = doc_to_messages(self._doc(task, split, doc_id))
        return _chat_prompt(messages, _where(task, split, doc_id))

    def _round(self, args: tuple, number: int, answers: list[str], state: Any) -> Round:
        if number == 0:
            return self._prompt(args), answers, state
        _, doc_to_messages, _, doc_id, task, split = args
        where = _where(task, split, doc_id)
        reply = doc_to_messages(
            self._doc(task, split, doc_id),
            round_idx=number,
            previous_output=list(answers),
            previous_round_info=state,
        )
        _check_round(reply, 4, where)
        messages, is_over, previous, state = reply
        return None if is_over else _chat_prompt(messages, where), list(previous or answers), state


class SimpleFlamingo(_Flamingo):
    """Answers a text with images before it. ``args``: text, generation_kwargs, doc_to_visual, doc_id, task,
    split, with doc_to_text before doc_id in multi-round requests.
    """

    is_simple = True

    def _options(self, args: tuple) -> dict[str, Any]:
        return args[1]

    def _prompt(self, args: tuple) -> Prompt:
        text, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self._doc(task, split, doc_id))
        return simple_prompt(text, visuals, _where(task, split, doc_id))

    def _round(self, args: tuple, number: int, answers: list[str], state: Any) -> Round:
        text, _, doc_to_visual, doc_to_text, doc_id, task, split = args
        doc, where = self._doc(task, split, doc_id), _where(task, split, doc_id)
        if number == 0:
            return simple_prompt(text, doc_to_visual(doc), where), answers, state
        reply = doc_to_text(doc, round_idx=number, previous_output=list(answers), previous_round_info=state)
        _check_round(reply, 5, where)
        visuals, text, is_over, previous, state = reply
        prompt = None if is_over else simple_prompt(text, visuals, where)
        return prompt, list(previous or answers), state


def _chat_prompt(messages: list[dict[str, Any]], where: str) -> Prompt:
    return chat_prompt(ChatMessages(messages=messages).messages, where)


def _check_round(reply: Any, size: int, where: str) -> None:
    """Raise UserError unless a task's reply to the answers so far has the parts of lmms-eval's protocol."""
    if not isinstance(reply, tuple) or len(reply) != size:
        raise UserError(
            f"{where}: a further round must be a tuple of {size} values, got {type(reply).__name__}; "
            "choose a task that follows lmms-eval's multi-round protocol"
        )


def _where(task: str, split: str, doc_id: int) -> str:
    return f"{task}, {split}, row {doc_id}"


def _to_batch_size(value: int | str) -> int:
    """Return lmms-eval's ``--batch_size`` as a number. Raise UserError for ``auto``."""
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"batch_size: must be a number of at least 1, got {value}; set --batch_size 8")
    return int(value)
