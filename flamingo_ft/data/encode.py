"""From a dialogue to token ids and labels: loss on what the assistant says and its end token, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, flatten

IGNORED = -100  # the label that carries no loss, as in torch's cross-entropy


@dataclass(frozen=True)
class Encoded:
    """Token ids of one dialogue (T,) and their labels (T,), `IGNORED` wherever there is no loss."""

    input_ids: list[int]
    labels: list[int]


def encode(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    """Token ids and labels of a whole dialogue.

    Where the chat template marks what the assistant generates, its marks decide; otherwise the assistant's part is
    what each of its turns adds to the text before it. Raises UserError for a template that allows neither.
    """
    turns = [flatten(message) for message in messages]
    if "generation" in processor.chat_template.replace("add_generation_prompt", ""):
        out = _apply(processor, turns, return_assistant_tokens_mask=True)
        ids, mask = out["input_ids"], out["assistant_masks"]
    else:
        ids, mask = _mask_by_prefix(processor, turns)
    return Encoded(list(ids), [token if said else IGNORED for token, said in zip(ids, mask, strict=True)])


def encode_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a dialogue up to where the assistant is to speak."""
    turns = [flatten(message) for message in messages]
    return list(_apply(processor, turns, add_generation_prompt=True)["input_ids"])


def text_of(message: Mapping[str, Any]) -> str:
    """The words of a message, without its images."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _apply(processor: FlamingoProcessor, turns: list[dict], **kwargs: Any) -> Mapping[str, Any]:
    return processor.tokenizer.apply_chat_template(
        turns, chat_template=processor.chat_template, tokenize=True, return_dict=True, **kwargs
    )


def _mask_by_prefix(processor: FlamingoProcessor, turns: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them an assistant turn added to the rendered text."""
    text = _render(processor, turns)
    spans = [_span(processor, turns, i, text) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    out = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [any(a < end and b > start for start, end in spans) for a, b in out["offset_mapping"]]
    return out["input_ids"], mask


def _span(processor: FlamingoProcessor, turns: list[dict], index: int, text: str) -> tuple[int, int]:
    """Where assistant turn ``index`` stands in ``text``, from its first word to its end token."""
    before = _render(processor, turns[:index], add_generation_prompt=True)
    through = _render(processor, turns[: index + 1]).rstrip()
    if not (text.startswith(through) and through.startswith(before)):
        raise UserError(
            "chat template: cannot tell the assistant's words from the rest (it rewrites earlier turns); "
            "mark them with {% generation %} in the tokenizer's chat template"
        )
    return len(before), len(through)


def _render(processor: FlamingoProcessor, turns: list[dict], **kwargs: Any) -> str:
    return processor.tokenizer.apply_chat_template(
        turns, chat_template=processor.chat_template, tokenize=False, **kwargs
    )
