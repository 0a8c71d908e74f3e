"""The dialogue of a visitor: what the model reads of it, and what the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_ft.data.sample import text_message
from flamingo_ft.errors import UserError
from flamingo_ft.inference.prompts import Prompt, make_prompt, place_images
from flamingo_ft.model.images import UnreadableImage, open_image

from .switchable_model import Answer

EMPTY = "(empty answer)"  # shown for an answer without text
Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question with the paths of its images, and its answers, None before their first token.

    is_compared: whether it is also asked without the adapter, for ``base_answer``.
    """

    text: str
    images: tuple[str, ...] = ()
    is_compared: bool = False
    answer: Answer | None = None
    base_answer: Answer | None = None


def make_turn(text: str, images: Sequence[str], is_compared: bool = False) -> Turn:
    """Return a question. Raises UserError for a question without text and images, and for a bad image."""
    if not text and not images:
        raise UserError("question: got neither a text nor an image; ask something, or add an image")
    for image in images:
        try:
            open_image(image)
        except UnreadableImage as error:
            raise UserError(f"{Path(image).name}: not a readable image ({error}); replace it") from None
    return Turn(text, tuple(images), is_compared)


def prompt_of(turns: Sequence[Turn]) -> Prompt:
    """Return the dialogue up to its last question, with the adapter's answers to the earlier ones.

    The model is asked for its answer without the adapter in the same dialogue, so that only the last answer
    differs. Images alone are captioned, as `Predictor.__call__` does without a prompt.
    """
    *earlier, last = turns
    if not earlier and not last.text:
        return make_prompt(last.images, None)
    messages: list[Message] = []
    for turn in earlier:
        answer = turn.answer.text if turn.answer else ""
        messages += [_question(turn), text_message("assistant", answer)]
    images = [image for turn in turns for image in turn.images]
    return Prompt([*messages, _question(last)], images, "question")


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """Return the dialogue as a chat shows it."""
    return [message for turn in turns for message in (*_shown_question(turn), *_shown_answer(turn.answer))]


def base_messages_of(turns: Sequence[Turn]) -> list[Message]:
    """Return the questions that are asked without the adapter too, with those answers."""
    compared = [turn for turn in turns if turn.is_compared]
    return [
        message for turn in compared for message in (*_shown_question(turn), *_shown_answer(turn.base_answer))
    ]


def _question(turn: Turn) -> Message:
    images = len(turn.images)
    content = place_images(turn.text, images) if turn.text else [{"type": "image"}] * images
    return {"role": "user", "content": content}


def _shown_question(turn: Turn) -> list[Message]:
    images = [{"role": "user", "content": {"path": image}} for image in turn.images]
    return [*images, *([{"role": "user", "content": turn.text}] if turn.text else [])]


def _shown_answer(answer: Answer | None) -> list[Message]:
    if answer is None:
        return []
    text = {"role": "assistant", "content": answer.text or EMPTY}
    picture = {"role": "assistant", "content": {"path": answer.picture}}
    return [text, picture] if answer.picture else [text]
