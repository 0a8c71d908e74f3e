"""What becomes of a sample with more text tokens than fit: an error, nothing, or less of it, images with their text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, is_image

from .document import first_chunks, is_document
from .encode import Cut, Encoded, encode, is_learned
from .sample import Sample

TooLong = Literal["error", "drop_sample", "drop_turns", "truncate_text"]

NOTHING_TO_LEARN = "found no word of the assistant's to learn"


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
    if not is_learned(whole.labels):
        return _nothing_to_learn(policy)
    if found <= limit:
        return whole
    if policy == "error":
        raise UserError(
            f"found {found} text tokens, the limit is {limit}; "
            "shorten the sample, raise data.max_text_tokens (up to the language model's context) or set data.too_long"
        )
    kept = _SHORTEN[policy](processor, sample, whole, limit)
    if kept is None:
        return Dropped(f"found {found} text tokens, the limit is {limit}", too_long=True)
    if not is_learned(kept.labels):
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
