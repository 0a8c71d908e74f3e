"""Examples as prompts: chunks of a few-shot prompt, as OpenFlamingo is evaluated, or turns of a chat.

With two demonstrations, the chunks of a VQA task read, as text::

    <image>Question:Is it red? Short answer:yes<|endofchunk|>
    <image>Question:How many? Short answer:2<|endofchunk|>
    <image>Question:What is it? Short answer:

and without their images, which OpenFlamingo calls 0 shots, the demonstrations have no ``<image>``
(github.com/mlfoundations/open_flamingo, open_flamingo/eval: evaluate.py, models/open_flamingo.py). There, 0
shots of a task that ranks labels still pass the demonstrations' images to the model, whose question then
looks at the first of them; here they are left out in every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flamingo_ft.data.sample import CHUNK, text_message
from flamingo_ft.inference.predictor import Prompt

from .task import Example, Task


def few_shot_prompt(
    task: Task, example: Example, demonstrations: Sequence[Example] = (), *, show_images: bool = True
) -> Prompt:
    """Return the example as the last chunk of a prompt, after the demonstrations with their answers.

    show_images: whether the demonstrations keep their images.
    """
    chunks = [_chunk(task, shown, show_images) for shown in demonstrations]
    answers = [shown.references[0] for shown in demonstrations]
    messages = []
    for chunk, answer in zip([*chunks, _chunk(task, example)], [*answers, ""], strict=True):
        before = _text(task.separator if messages else "")
        messages.append({"role": CHUNK, "content": [*before, *chunk, *_text(answer)]})
    return Prompt(messages, _paths(example, demonstrations, show_images), example.where)


def chat_prompt(
    task: Task, example: Example, demonstrations: Sequence[Example] = (), *, show_images: bool = True
) -> Prompt:
    """Return the example as a user message, after the demonstrations as earlier turns of the dialogue.

    show_images: whether the demonstrations keep their images.
    """
    messages = []
    for shown in demonstrations:
        messages += [_request(task, shown, show_images), text_message("assistant", shown.references[0])]
    messages.append(_request(task, example))
    return Prompt(messages, _paths(example, demonstrations, show_images), example.where)


def _chunk(task: Task, example: Example, show_images: bool = True) -> list[dict[str, Any]]:
    text = task.chunk.format(question=example.question)
    return [*(_images(example) if show_images else ()), *_text(text)]


def _request(task: Task, example: Example, show_images: bool = True) -> dict[str, Any]:
    text = task.chat.format(question=example.question)
    return {"role": "user", "content": [*(_images(example) if show_images else ()), *_text(text)]}


def _paths(example: Example, demonstrations: Sequence[Example], show_images: bool) -> list[str]:
    shown = [*(demonstrations if show_images else ()), example]
    return [path for one in shown for path in one.images]


def _images(example: Example) -> list[dict[str, Any]]:
    return [{"type": "image"} for _ in example.images]


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []
