"""From a dialogue or document to token ids and labels, and what happens to samples that are too long.

The loss covers what the assistant says and its end token, nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.model.label_positions import IGNORED
from flamingo_ft.model.processor import FlamingoProcessor, flatten, is_image
from flamingo_ft.model.special_text import Tokens, encode_text

from .render import (
    answers_rewritten,
    first_chunks,
    is_document,
    is_few_shot,
    render_chunks,
    render_dialogue,
    render_document,
    render_document_prompt,
    render_prompt,
)
from .sample import Sample, text_message

NOTHING_TO_LEARN = "no assistant text to train on"

Messages = Sequence[Mapping[str, Any]]
TooLong = Literal["error", "drop_sample", "drop_turns", "truncate_text"]


@dataclass(frozen=True)
class Cut:
    """What was cut from a sample that was too long: exchanges or chunks, text tokens, images."""

    turns: int = 0
    tokens: int = 0
    images: int = 0


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample (T,) and their labels (T,), `IGNORED` for those not in the loss.

    images: how many of the sample's images and videos, from the first, are in it. cut: what was cut.
    rewritten: whether the chat template leaves out or changes words of an answer that is trained on.
    """

    input_ids: list[int]
    labels: list[int]
    images: int = 0
    cut: Cut = Cut()
    rewritten: bool = False

    @property
    def text_tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def label_tokens(self) -> int:
        """Number of tokens in the loss; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Dropped:
    """A sample that is not trained on, and why.

    too_long: whether its length is the reason; else there is nothing to train on in it.
    """

    reason: str
    too_long: bool = False


def encode(processor: FlamingoProcessor, sample: Sample | Messages) -> Encoded:
    """Encode a whole dialogue, or a document in OpenFlamingo's form.

    If the chat template marks what the assistant generates ({% generation %}), its marks decide about labels;
    otherwise the assistant's part is what each of its turns adds to the text before it. A message with
    ``"loss": False`` has no labels, and neither a media token nor a tag of its tiles ever has one. A special
    token typed in a text is encoded as text. Raises UserError for a template that refuses the dialogue,
    leaves out its images or hides the assistant's part, and for a tokenizer without offsets.
    """
    messages = _messages(sample)
    if is_document(messages):
        text, spans = render_document(processor, messages)
        rewritten = False
    else:
        text, spans = render_dialogue(processor, messages)
        rewritten = answers_rewritten(processor, messages, text)
    tokens = _tokenize(processor.tokenizer, text, [start for start, _ in spans])
    labels = [
        token if token not in processor.input_only_ids and _overlaps(offsets, spans) else IGNORED
        for token, offsets in zip(tokens.ids, tokens.offsets, strict=True)
    ]
    return Encoded(tokens.ids, labels, _check_images(processor, messages, tokens.ids), rewritten=rewritten)


def encode_within(
    processor: FlamingoProcessor, sample: Sample, max_text_tokens: int, policy: TooLong = "error"
) -> Encoded | Dropped:
    """Encode a sample into at most ``max_text_tokens`` tokens.

    What is left has the sample's first ``Encoded.images`` images. Raises UserError, naming file and row, as
    `encode` does, and with the policy "error" for a longer sample or one without labels.
    """
    try:
        return _shortened(processor, sample, encode(processor, sample), max_text_tokens, policy)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from None


def encode_prompt(processor: FlamingoProcessor, sample: Sample | Messages) -> list[int]:
    """Return the token ids of a prompt.

    That is a dialogue up to the assistant's answer, a document up to its last image, or a few-shot prompt.
    """
    messages = _messages(sample)
    if is_few_shot(messages):
        render = render_chunks
    else:
        render = render_document_prompt if is_document(messages) else render_prompt
    return encode_text(processor.tokenizer, render(processor, messages)).ids


def encode_answer(processor: FlamingoProcessor, messages: Messages, text: str) -> list[int]:
    """Return the token ids that an answer adds to a prompt, the end of the assistant's turn included.

    The answer to a few-shot prompt ends with its chunk. Raises UserError for a prompt that is not the
    beginning of the text with its answer.
    """
    prompt = encode_prompt(processor, messages)
    if is_few_shot(messages):
        *before, last = messages
        answered = {**last, "content": [*last["content"], {"type": "text", "text": text}]}
        whole = encode_prompt(processor, [*before, answered, {**last, "content": ""}])
    else:
        whole = encode(processor, [*messages, text_message("assistant", text)]).input_ids
    if whole[: len(prompt)] != prompt:
        raise UserError(
            f"prompt: its last tokens change when the answer {text!r} follows; "
            "use a prompt or chat template that ends with a line break or a special token"
        )
    return whole[len(prompt) :]


def end_token_id(processor: FlamingoProcessor) -> int | None:
    """Return the token with which the chat template ends an answer; None if it is not an added token."""
    labels = encode(processor, [text_message("user", "a"), text_message("assistant", "a")]).labels
    last = [token for token in labels if token != IGNORED][-1]
    return last if last in processor.tokenizer.added_tokens_decoder else None


def has_labels(labels: Sequence[int]) -> bool:
    """Whether any token is in the loss; the first token is never predicted."""
    return any(label != IGNORED for label in labels[1:])


def _messages(sample: Sample | Messages) -> Messages:
    return sample.messages if isinstance(sample, Sample) else sample


def _overlaps(offsets: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    begin, stop = offsets
    return any(begin < end and stop > start for start, end in spans)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, starts: Sequence[int]) -> Tokens:
    """Tokenize a text so that no token crosses one of ``starts``, where a prompt ends and an answer begins.

    Some tokenizers have one token for the line break that ends a prompt and the one that begins an answer.
    """
    whole = encode_text(tokenizer, text)
    cuts = [start for start in starts if any(begin < start < stop for begin, stop in whole.offsets)]
    if not cuts:
        return whole
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for first, last in pairwise([0, *cuts, len(text)]):
        piece = encode_text(tokenizer, text[first:last])
        ids += piece.ids
        offsets += [(begin + first, stop + first) for begin, stop in piece.offsets]
    # Tokenizers that put a space before every text would put one before every piece.
    return Tokens(ids, offsets) if tokenizer.decode(ids) == tokenizer.decode(whole.ids) else whole


def _check_images(processor: FlamingoProcessor, messages: Messages, ids: list[int]) -> int:
    """Return how many media tokens there are. Raises UserError if the messages have another number."""
    images = sum(flatten(message, processor.tokenizer)["content"].count(MEDIA_TOKEN) for message in messages)
    found = ids.count(cast(int, processor.image_token_id))
    if found != images:
        raise UserError(
            f"chat template: got {found} {MEDIA_TOKEN} tokens where the dialogue has {images} images; "
            "use a template that writes every message whole"
        )
    return found


def _shortened(
    processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int, policy: TooLong
) -> Encoded | Dropped:
    if not has_labels(whole.labels):
        if policy == "error":
            raise UserError(f"{NOTHING_TO_LEARN}; remove the sample")
        return Dropped(NOTHING_TO_LEARN)
    length = whole.text_tokens
    if length <= limit:
        return whole
    if policy == "error":
        raise UserError(
            f"got {length} text tokens, the limit is {limit}; "
            "shorten the sample, raise data.max_text_tokens (up to the language model's context) "
            "or set data.too_long"
        )
    kept = _SHORTEN[policy](processor, sample, whole, limit)
    if kept is None:
        return Dropped(f"got {length} text tokens, the limit is {limit}", too_long=True)
    if not has_labels(kept.labels):
        return Dropped(f"{NOTHING_TO_LEARN} among its first {limit} of {length} text tokens", too_long=True)
    cut = Cut(kept.cut.turns, length - kept.text_tokens, whole.images - kept.images)
    return replace(kept, cut=cut)


def _drop_sample(processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int) -> None:
    return None


def _drop_turns(processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int) -> Encoded | None:
    """Keep as many of the first exchanges as fit, with their images; None if not even the first fits."""
    count, first = _exchanges(sample.messages)
    fitting = bisect_right(
        range(1, count), limit, key=lambda number: encode(processor, first(number)).text_tokens
    )
    if not fitting:
        return None
    return replace(encode(processor, first(fitting)), cut=Cut(turns=count - fitting))


def _exchanges(messages: list[dict[str, Any]]) -> tuple[int, Callable[[int], list[dict[str, Any]]]]:
    """Return how many exchanges there are, and a function for the messages of the first n.

    For a document, each chunk counts as an exchange.
    """
    if is_document(messages):
        images = sum(map(is_image, messages[0]["content"]))
        return images, lambda count: [first_chunks(messages[0], count)]
    ends = [*_exchange_starts(messages), len(messages)]
    return len(ends) - 1, lambda count: messages[: ends[count]]


def _exchange_starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the indices of the messages that begin an exchange.

    These are the first message and each non-assistant message that follows an assistant message, if there is
    an assistant message from there on.
    """
    roles = [message["role"] for message in messages]
    starts = [0]
    starts += [i for i in range(1, len(roles)) if roles[i - 1] == "assistant" and roles[i] != "assistant"]
    return [index for index in starts if "assistant" in roles[index:]]


def _truncate_text(processor: FlamingoProcessor, sample: Sample, whole: Encoded, limit: int) -> Encoded:
    """Keep the first tokens, without images at the end that have no text after them."""
    ids = whole.input_ids[:limit]
    media, tokenizer = cast(int, processor.image_token_id), processor.tokenizer
    while media in ids:
        last = len(ids) - 1 - ids[::-1].index(media)
        if tokenizer.decode(ids[last + 1 :], skip_special_tokens=True).strip():
            break
        ids = ids[:last]
    return Encoded(ids, whole.labels[: len(ids)], ids.count(media), rewritten=whole.rewritten)


_SHORTEN: dict[str, Callable[..., Encoded | None]] = {
    "drop_sample": _drop_sample,
    "drop_turns": _drop_turns,
    "truncate_text": _truncate_text,
}
