"""From a dialogue or document to token ids and labels: loss on what the assistant says and its end, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.model.processor import FlamingoProcessor, flatten
from flamingo_ft.model.special_text import Tokens, encode_text

from .dialogue import is_rewritten, write_dialogue, write_prompt
from .document import is_document, write_beginning, write_document
from .sample import Sample

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
        text, learned = write_document(processor, messages)
        rewritten = False
    else:
        text, learned = write_dialogue(processor, messages)
        rewritten = is_rewritten(processor, messages, text)
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
    write = write_beginning if is_document(messages) else write_prompt
    return encode_text(processor.tokenizer, write(processor, messages)).ids


def end_token_id(processor: FlamingoProcessor) -> int | None:
    """The token with which the chat template ends what the assistant says; None where it is an ordinary word."""
    labels = encode(processor, [text_message("user", "a"), text_message("assistant", "a")]).labels
    last = [token for token in labels if token != IGNORED][-1]
    return last if last in processor.tokenizer.added_tokens_decoder else None


def is_learned(labels: Sequence[int]) -> bool:
    """Whether there is anything to learn; the first token is never predicted."""
    return any(label != IGNORED for label in labels[1:])


def text_message(role: str, text: str) -> dict[str, Any]:
    """A message of words alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Mapping[str, Any]) -> str:
    """The words of a message, without its images."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def readable(message: Mapping[str, Any]) -> str:
    """A message for people to read, ``<image>`` where an image stands."""
    return "".join(block["text"] if block["type"] == "text" else MEDIA_TOKEN for block in message["content"])


def _messages(sample: Sample | Messages) -> Messages:
    return sample.messages if isinstance(sample, Sample) else sample


def _check_images(processor: FlamingoProcessor, messages: Messages, ids: list[int]) -> int:
    """How many images there are: as many media tokens as the messages have."""
    wanted = sum(flatten(message, processor.tokenizer)["content"].count(MEDIA_TOKEN) for message in messages)
    found = ids.count(processor.image_token_id)
    if found != wanted:
        raise UserError(
            f"chat template: found {found} {MEDIA_TOKEN} tokens where the dialogue has {wanted} images; "
            "use a template that writes every message whole"
        )
    return found
