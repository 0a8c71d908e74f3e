"""Check texts: what data.too_long removes of a sample, and what the chat template adds to a dialogue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from flamingo_ft.adapters.answering import stop_token_ids
from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import IGNORED, Dropped, Encoded, TooLong, encode_within
from flamingo_ft.data.pairs import EncodedPair, encode_pair
from flamingo_ft.data.prompts import encode_question
from flamingo_ft.data.render import render_dialogue, render_prompt
from flamingo_ft.data.sample import Sample, text_message
from flamingo_ft.data.unpaired import encode_unpaired
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import answer_lengths, end_tokens_of
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.special_text import encode_text

POLICIES: tuple[TooLong, ...] = ("drop_sample", "drop_turns", "truncate_text")
UNLIMITED = 2**62  # text tokens
QUESTION, ANSWER = "qzask", "qzsay"  # placeholders that occur in no chat template
MAX_QUOTED = 160  # characters


# --- one sample ---


@dataclass(frozen=True)
class InspectedText:
    """The encoded text of a sample, or both texts of a preference pair.

    Attributes:
        encoded: what trains; None if data.too_long drops the sample or there is a ``problem``.
        losses: for a sample over the limit: samples, turns, tokens and images that each policy removes.
        answers: tokens of each reference answer, before truncation.
    """

    encoded: Encoded | EncodedPair | None = None
    problem: str | None = None
    losses: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: tuple[int, ...] = ()


def texts_of(encoded: Encoded | EncodedPair) -> tuple[Encoded, ...]:
    """Return the encoded text, or both texts of a pair, the chosen one first."""
    return (encoded.chosen, encoded.rejected) if isinstance(encoded, EncodedPair) else (encoded,)


class TextInspector:
    """Encode samples as training with ``method`` does, into at most ``limit`` text tokens."""

    def __init__(self, processor: FlamingoProcessor, data: DataSection, limit: int, method: str = "sft"):
        self.processor, self.policy, self.limit, self.method = processor, data.too_long, limit, method
        self._ends = end_tokens_of(processor)

    def __call__(self, sample: Sample) -> InspectedText:
        try:
            whole = self._encode(sample, UNLIMITED, "drop_sample")
            answers = () if isinstance(whole, Dropped) else self._answers(sample, whole)
            if not isinstance(whole, Dropped) and whole.text_tokens <= self.limit:
                return InspectedText(whole, answers=answers)
        except UserError as error:
            return InspectedText(problem=str(error))
        losses = {} if isinstance(whole, Dropped) else self._losses(sample, whole)
        try:
            encoded = self._encode(sample, self.limit, self.policy)
        except UserError as error:
            return InspectedText(problem=str(error), losses=losses)
        return InspectedText(
            None if isinstance(encoded, Dropped) else encoded, losses=losses, answers=answers
        )

    def _answers(self, sample: Sample, whole: Encoded | EncodedPair) -> tuple[int, ...]:
        return tuple(answer_lengths(self.processor, sample, texts_of(whole)[0], self._ends))

    def _encode(self, sample: Sample, limit: int, policy: TooLong) -> Encoded | EncodedPair | Dropped:
        encode = encode_within
        if self.method == "grpo":
            encode = _encode_question
        elif self.method in ("dpo", "kto") and sample.rejected:
            encode = encode_pair
        elif self.method == "kto" and sample.label is not None:
            encode = encode_unpaired
        return encode(self.processor, sample, limit, policy)

    def _losses(self, sample: Sample, whole: Encoded | EncodedPair) -> dict[str, dict[str, int]]:
        """Return what each policy removes of a sample that is over the limit."""
        everything: dict[str, int] = {
            "samples": 1,
            "turns": max(1, sum(message["role"] == "assistant" for message in sample.messages)),
            "tokens": sum(text.text_tokens for text in texts_of(whole)),
            "images": whole.images,
        }
        losses: dict[str, dict[str, int]] = {}
        for policy in POLICIES:
            outcome = self._encode(sample, self.limit, policy)
            if isinstance(outcome, Dropped):
                losses[policy] = everything
            else:
                losses[policy] = {"samples": 0, **asdict(outcome.cut)}
        return losses


def _encode_question(
    processor: FlamingoProcessor, sample: Sample, limit: int, policy: TooLong
) -> Encoded | Dropped:
    """Encode a question of grpo. It has no labels: the answers that are trained on are sampled."""
    question = encode_question(processor, sample, limit, policy)
    if isinstance(question, Dropped):
        return question
    return Encoded(question.input_ids, [IGNORED] * question.text_tokens, question.images)


# --- the chat template ---


@dataclass(frozen=True)
class Piece:
    """Text that the chat template writes, and its tokens as the vocabulary spells them."""

    text: str
    tokens: list[str]


@dataclass(frozen=True)
class DialogueFormat:
    """What the chat template writes around a question and its answer, in training and at inference alike.

    Attributes:
        begins: before the first question.
        prompt: between a question and its answer.
        ends: after an answer, in the loss; ``follows`` comes after that, not in the loss.
        stops: tokens at which generation stops.
        learns_to_stop: ``ends`` contains one of them.
    """

    begins: Piece
    prompt: Piece
    ends: Piece
    follows: Piece
    stops: list[str]
    learns_to_stop: bool

    @property
    def lines(self) -> list[str]:
        """The same in words."""
        ends = f"end with {_quoted(self.ends.text)}" if self.ends.text else "have no end"
        follows = f" (then {_quoted(self.follows.text)}, not in the loss)" if self.follows.text else ""
        begins = _quoted(self.begins.text) if self.begins.text else "the first question"
        prompt = _quoted(self.prompt.text) if self.prompt.text else "no text"
        return [
            f"dialogues begin with {begins}; {prompt} precedes answers, which {ends}{follows}",
            f"generation stops at {' or '.join(self.stops) or 'no token'}",
        ]

    @property
    def warning(self) -> str | None:
        if self.learns_to_stop:
            return None
        return (
            "the chat template ends answers without a token that stops generation: answers run on until "
            "eval.max_new_tokens; set data.template to flamingo"
        )


def dialogue_format(
    processor: FlamingoProcessor, own_ends: int | Sequence[int] | None
) -> DialogueFormat | None:
    """Return what the processor's chat template writes around the two placeholders of a dialogue.

    own_ends: the end tokens of the language model's generation configuration.

    Returns None for a template that alters the placeholders or writes the prompt of an answer differently.
    """
    messages = [text_message("user", QUESTION), text_message("assistant", ANSWER)]
    try:
        text, spans = render_dialogue(processor, messages)
        prompt = render_prompt(processor, messages[:1])
    except UserError:
        return None
    if text.count(QUESTION) != 1 or text.count(ANSWER) != 1 or not text.startswith(prompt) or not spans:
        return None
    question_start, answer_end = text.index(QUESTION), text.index(ANSWER) + len(ANSWER)
    loss_end = max(answer_end, spans[-1][1])
    begins = _piece(processor, text, 0, question_start)
    asks = _piece(processor, text, question_start + len(QUESTION), len(prompt))
    ends = _piece(processor, text, answer_end, loss_end)
    follows = _piece(processor, text, loss_end, len(text))
    stops = processor.tokenizer.convert_ids_to_tokens(stop_token_ids(processor, own_ends))
    return DialogueFormat(begins, asks, ends, follows, stops, not set(stops).isdisjoint(ends.tokens))


def _piece(processor: FlamingoProcessor, text: str, begin: int, end: int) -> Piece:
    """Return text[begin:end] with the tokens that lie within it."""
    encoding = encode_text(processor.tokenizer, text)
    ids = [
        token
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        if begin <= start < stop <= end
    ]
    return Piece(text[begin:end], processor.tokenizer.convert_ids_to_tokens(ids))


def _quoted(text: str) -> str:
    """Quote ``text`` on one line, leaving out the middle of a long system prompt."""
    if len(text) > MAX_QUOTED:
        text = f"{text[: MAX_QUOTED // 2]} ... {text[-MAX_QUOTED // 2 :]}"
    return json.dumps(text, ensure_ascii=False)
