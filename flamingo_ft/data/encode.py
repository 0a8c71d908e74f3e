"""From a dialogue or document to token ids and labels: loss on what the assistant says and its end, nothing else.

What becomes of a sample with more text tokens than fit: an error, nothing, or less of it, images with their text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.model.processor import FlamingoProcessor, flatten, is_image
from flamingo_ft.model.special_text import Tokens, encode_text

from .render import (
    answers_are_rewritten,
    first_chunks,
    is_document,
    render_dialogue,
    render_document,
    render_document_prompt,
    render_prompt,
)
from .sample import Sample, text_message

IGNORED = -100  # the label that carries no loss, as in torch's cross-entropy

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cut:
    """What was taken from a sample that was too long: exchanges or chunks, text tokens, images."""

    turns: int = 0
    tokens: int = 0
    images: int = 0


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample (T,) and their labels (T,), `IGNORED` wherever there is no loss.

    images: how many of the sample's first images and videos stand in it; cut: what was taken away; rewritten: whether
    the chat template leaves out or changes words of an answer that is learned.
    """

    input_ids: list[int]
    labels: list[int]
    images: int = 0
    cut: Cut = Cut()
    rewritten: bool = False

    @property
    def text_tokens(self) -> int:
        """Tokens in all."""
        return len(self.input_ids)

    @property
    def label_tokens(self) -> int:
        """Tokens that are learned; each is told by the one before."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(processor: FlamingoProcessor, sample: Sample | Messages) -> Encoded:
    """Token ids and labels of a whole dialogue, or of a document in OpenFlamingo's form.

    Where the chat template marks what the assistant generates, its marks decide; otherwise the assistant's part
    is what each of its turns adds to the text before it. A message with ``"loss": False`` has no labels, and a media
    token never has one. A special token typed inside text is text. Raises UserError for a template that refuses the
    dialogue, leaves out its images or hides the assistant's part, and for a tokenizer without offsets.
    """
    messages = _messages(sample)
    if is_document(messages):
        text, learned = render_document(processor, messages)
        rewritten = False
    else:
        text, learned = render_dialogue(processor, messages)
        rewritten = answers_are_rewritten(processor, messages, text)
    tokens = _tokens(processor.tokenizer, text, [start for start, _ in learned])
    said = (any(a < end and b > start for start, end in learned) for a, b in tokens.offsets)
    labels = [
        token if each and token != processor.image_token_id else IGNORED
        for token, each in zip(tokens.ids, said, strict=True)
    ]
    return Encoded(tokens.ids, labels, _check_images(processor, messages, tokens.ids), rewritten=rewritten)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, begins: Sequence[int]) -> Tokens:
    """The tokens of a text. None crosses one of ``begins``: a prompt ends there, and what is generated begins.

    A tokenizer may have one token for the line break that ends a prompt and the one that begins an answer.
    """
    whole = encode_text(tokenizer, text)
    cuts = [begin for begin in begins if any(a < begin < b for a, b in whole.offsets)]
    if not cuts:
        return whole
    ids, offsets = [], []
    for begin, end in pairwise([0, *cuts, len(text)]):
        piece = encode_text(tokenizer, text[begin:end])
        ids += piece.ids
        offsets += [(a + begin, b + begin) for a, b in piece.offsets]
    # some tokenizers put a space before every text, and so before every piece
    return Tokens(ids, offsets) if tokenizer.decode(ids) == tokenizer.decode(whole.ids) else whole


def encode_prompt(processor: FlamingoProcessor, sample: Sample | Messages) -> list[int]:
    """Token ids of a dialogue up to where the assistant is to speak, or of a document up to its last image."""
    messages = _messages(sample)
    write = render_document_prompt if is_document(messages) else render_prompt
    return encode_text(processor.tokenizer, write(processor, messages)).ids


def end_token_id(processor: FlamingoProcessor) -> int | None:
    """The token with which the chat template ends what the assistant says; None where it is an ordinary word."""
    labels = encode(processor, [text_message("user", "a"), text_message("assistant", "a")]).labels
    last = [token for token in labels if token != IGNORED][-1]
    return last if last in processor.tokenizer.added_tokens_decoder else None


def has_labels(labels: Sequence[int]) -> bool:
    """Whether there is anything to learn; the first token is never predicted."""
    return any(label != IGNORED for label in labels[1:])


def _messages(sample: Sample | Messages) -> Messages:
    return sample.messages if isinstance(sample, Sample) else sample


def _check_images(processor: FlamingoProcessor, messages: Messages, ids: list[int]) -> int:
    """How many images there are: as many media tokens as the messages have."""
    wanted = sum(flatten(message, processor.tokenizer)["content"].count(MEDIA_TOKEN) for message in messages)
    found = ids.count(processor.image_token_id)
    if found != wanted:
        raise UserError(
            f"chat template: got {found} {MEDIA_TOKEN} tokens where the dialogue has {wanted} images; "
            "use a template that writes every message whole"
        )
    return found


TooLong = Literal["error", "drop_sample", "drop_turns", "truncate_text"]

NOTHING_TO_LEARN = "no assistant text to train on"


@dataclass(frozen=True)
class Dropped:
    """A sample that is not trained on, and why.

    too_long: for its length alone; else there is nothing to learn in it, or nothing is left.
    """

    reason: str
    too_long: bool = False


def encode_within(
    processor: FlamingoProcessor, sample: Sample, max_text_tokens: int, policy: TooLong = "error"
) -> Encoded | Dropped:
    """The sample's token ids and labels, at most ``max_text_tokens`` of them.

    What remains keeps the sample's first ``Encoded.images`` images. Raises UserError, naming file and row, for what
    `encode` refuses, and under the policy "error" for a longer sample or one without anything to learn.
    """
    try:
        whole = encode(processor, sample)
        return _shortened(processor, sample, whole, max_text_tokens, policy)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from None


def _shortened(
    processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int, policy: TooLong
) -> Encoded | Dropped:
    found = len(whole.input_ids)
    if not has_labels(whole.labels):
        return _nothing_to_learn(policy)
    if found <= limit:
        return whole
    if policy == "error":
        raise UserError(
            f"got {found} text tokens, the limit is {limit}; "
            "shorten the sample, raise data.max_text_tokens (up to the language model's context) or set data.too_long"
        )
    kept = _SHORTEN[policy](processor, sample, whole, limit)
    if kept is None:
        return Dropped(f"got {found} text tokens, the limit is {limit}", too_long=True)
    if not has_labels(kept.labels):
        return Dropped(f"{NOTHING_TO_LEARN} among its first {limit} of {found} text tokens", too_long=True)
    return replace(kept, cut=_cut(whole, kept, kept.cut.turns))


def _nothing_to_learn(policy: TooLong) -> Dropped:
    if policy == "error":
        raise UserError(f"{NOTHING_TO_LEARN}; remove the sample")
    return Dropped(NOTHING_TO_LEARN)


def _cut(whole: Encoded, kept: Encoded, turns: int) -> Cut:
    return Cut(turns, len(whole.input_ids) - len(kept.input_ids), whole.images - kept.images)


def _drop_sample(processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int) -> None:
    return None


def _drop_turns(processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int) -> Encoded | None:
    """As many of the first exchanges as fit, with their images; None where not even the first does."""
    count, first = _exchanges(sample.messages)
    fitting = bisect_right(
        range(1, count), limit, key=lambda number: len(encode(processor, first(number)).input_ids)
    )
    if not fitting:
        return None
    return replace(encode(processor, first(fitting)), cut=Cut(turns=count - fitting))


def _exchanges(messages: list[dict[str, Any]]) -> tuple[int, Callable[[int], list[dict[str, Any]]]]:
    """How many exchanges there are, and the messages of the first so many. A document's are its chunks."""
    if is_document(messages):
        images = sum(map(is_image, messages[0]["content"]))
        return images, lambda count: [first_chunks(messages[0], count)]
    begins = _beginnings(messages)
    return len(begins), lambda count: messages[: [*begins, len(messages)][count]]


def _beginnings(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where each exchange begins: with the first message, and with each after an answer that is none itself."""
    roles = [message["role"] for message in messages]
    answered = [0, *(i for i in range(1, len(roles)) if roles[i - 1] == "assistant" != roles[i])]
    return [index for index in answered if "assistant" in roles[index:]]


def _truncate_text(processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int) -> Encoded:
    """The first tokens, less the images at the end that have no text after them."""
    ids = whole.input_ids[:limit]
    media, tokenizer = processor.image_token_id, processor.tokenizer
    while media in ids:
        last = len(ids) - 1 - ids[::-1].index(media)
        if tokenizer.decode(ids[last + 1 :], skip_special_tokens=True).strip():
            break
        ids = ids[:last]
    return Encoded(ids, whole.labels[: len(ids)], ids.count(media), rewritten=whole.rewritten)


_SHORTEN = {"drop_sample": _drop_sample, "drop_turns": _drop_turns, "truncate_text": _truncate_text}
