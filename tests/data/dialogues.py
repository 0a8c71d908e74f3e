"""Dialogues, and processors with the nano tokenizer and tower under several chat templates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.data.encode import IGNORED, Encoded, encode, encode_prompt
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.processor import CHUNK_TEMPLATE, FlamingoProcessor

IMAGE = {"type": "image"}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|im_start|>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# As LLaVA v1 and Vicuna write a dialogue; without marks.
VICUNA = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
END_OUTSIDE_THE_MARKS = (
    "{% for m in messages %}{{ m['role'] + ':\n' }}"
    "{%- if m['role'] == 'assistant' -%}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{%- else -%}{{ m['content'] }}{%- endif -%}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def user(*parts: str | dict) -> dict[str, Any]:
    return {"role": "user", "content": blocks(parts)}


def assistant(*parts: str | dict) -> dict[str, Any]:
    return {"role": "assistant", "content": blocks(parts)}


def system(*parts: str | dict) -> dict[str, Any]:
    return {"role": "system", "content": blocks(parts)}


def blocks(parts: tuple) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


@cache
def nano_processor(template: str | None = None) -> FlamingoProcessor:
    """Return a processor with the nano tokenizer's own chat template, which marks answers, or another one.

    Tests share it: none may change it.
    """
    tokenizer = load_language("nano").tokenizer
    add_media_tokens(tokenizer)
    processor = FlamingoProcessor.for_backbones(load_vision("nano").preprocess, tokenizer)
    processor.chat_template = template or processor.chat_template
    return processor


# Each with the text that it writes for an answer: its words and its end token.
TEMPLATES = {
    "marked": (None, lambda words: f"{words}<|im_end|>"),
    "chatml": (CHATML, lambda words: f"{words}<|im_end|>"),
    "llama-2": (LLAMA_2, lambda words: f" {words} <|im_end|>"),
    "vicuna": (VICUNA, lambda words: f" {words}<|im_end|>"),
    "chunk": (CHUNK_TEMPLATE, lambda words: f" {words}<|endofchunk|>"),
    "end outside the marks": (END_OUTSIDE_THE_MARKS, lambda words: words),
}


def labelled_text(processor: FlamingoProcessor, encoded: Encoded) -> str:
    """Return the text in the loss."""
    return processor.tokenizer.decode([token for token in encoded.labels if token != IGNORED])


def prompts(processor: FlamingoProcessor, turns: list[dict]) -> Iterator[tuple[list[int], Encoded]]:
    """Yield for each answer its prompt, and the encoded dialogue up to its end."""
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield encode_prompt(processor, turns[:index]), encode(processor, turns[: index + 1])
