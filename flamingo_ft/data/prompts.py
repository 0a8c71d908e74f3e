"""Questions whose answers the model samples itself, for GRPO: within the context, and as TRL takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, is_image

from .encode import Cut, Dropped, TooLong, encode_prompt
from .examples import Example
from .pairs import answer_start
from .render import is_document
from .sample import Sample, Video, message_text


@dataclass(frozen=True)
class EncodedPrompt:
    """A dialogue up to its last answer, and the reference answers that sampled ones are compared with.

    input_ids: of the prompt. images: how many of the sample's first images are in it.
    """

    messages: list[dict[str, Any]]
    references: tuple[str, ...]
    input_ids: list[int]
    images: int

    label_tokens = 0  # it has no labels
    cut = Cut()  # and is never cut
    rewritten = False

    @property
    def text_tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)


def encode_question(
    processor: FlamingoProcessor, sample: Sample, max_text_tokens: int, policy: TooLong = "error"
) -> EncodedPrompt | Dropped:
    """Return the prompt of a sample's last answer, of at most ``max_text_tokens`` tokens.

    Every policy but "error" drops a longer one: without its end, a prompt asks another question. Raises
    UserError, naming file and row, for a longer prompt, a document, a video, and a sample without a reference
    answer.
    """
    start = answer_start(sample.messages)
    prompt = [{"role": m["role"], "content": m["content"]} for m in sample.messages[:start]]
    answer = "".join(message_text(message) for message in sample.messages[start:]).strip()
    try:
        if is_document(sample.messages):
            raise UserError("got a caption or document; grpo needs a question and its answer")
        if not answer:
            raise UserError("no reference answer; add the answer that sampled ones are compared with")
        images = sum(is_image(block) for message in prompt for block in message["content"])
        if any(isinstance(medium, Video) for medium in sample.images[:images]):
            raise UserError("got a video; grpo takes images only")
        ids = encode_prompt(processor, prompt)
    except UserError as error:
        raise UserError(f"{sample.where}: {error}") from None
    if len(ids) <= max_text_tokens:
        return EncodedPrompt(prompt, (answer, *sample.other_answers), ids, images)
    reason = f"got {len(ids)} text tokens before the answer, the limit is {max_text_tokens}"
    if policy == "error":
        raise UserError(
            f"{sample.where}: {reason}; shorten the sample, lower train.grpo.max_completion_tokens, "
            "raise data.max_text_tokens (up to the language model's context) or set data.too_long"
        )
    return Dropped(reason, too_long=True)


def sampling_rows(examples: Sequence[Example], num_generations: int) -> list[dict[str, Any]]:
    """Return ``num_generations`` rows for `trl.GRPOTrainer` for each example, one after the other.

    A row has ``prompt``, messages with their pictures, ``references`` and ``where``.
    """
    return [
        {"prompt": _with_pictures(example), "references": list(prompt.references), "where": example.where}
        for example, prompt in ((example, cast(EncodedPrompt, example.encoded)) for example in examples)
        for _ in range(num_generations)
    ]


def _with_pictures(example: Example) -> list[dict[str, Any]]:
    """Return the messages with a picture in each image block."""
    pictures = iter(example.media)
    messages = cast(EncodedPrompt, example.encoded).messages
    return [
        {"role": message["role"], "content": [*_filled(message["content"], pictures)]} for message in messages
    ]


def _filled(content: Sequence[dict[str, Any]], pictures: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for block in content:
        yield {**block, "image": next(pictures)} if is_image(block) else dict(block)
