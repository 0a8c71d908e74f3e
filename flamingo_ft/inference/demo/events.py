"""What happens on the page: questions, streamed answers, errors, and where an answer looks."""

from __future__ import annotations

import html
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import gradio as gr
from matplotlib.figure import Figure

from flamingo_ft.errors import UserError
from flamingo_ft.inference.decoding import Decoding
from flamingo_ft.inference.look import Look
from flamingo_ft.inference.look_figure import token_title
from flamingo_ft.machine_errors import out_of_memory

from .answer_boxes import with_picture
from .dialogue import Message, Turn, base_messages_of, make_turn, messages_of, prompt_of
from .switchable_model import SwitchableModel

Turns = tuple[Turn, ...]
EMPTY_BOX: Message = {"text": "", "files": []}
MEAN = -1  # the choice of all tokens or all layers
OPTIONS = {  # of `Decoding`, and what the page says of them; an empty field leaves one out
    "max_new_tokens": "longest answer, in tokens",
    "temperature": "samples; empty or 0: greedy",
    "top_p": "samples from this total probability",
    "top_k": "samples from so many tokens",
    "repetition_penalty": "above 1: fewer repetitions",
    "no_repeat_ngram_size": "so many tokens never recur",
    "seed": "of sampling; empty: varies",
}
FRACTIONS = ("temperature", "top_p", "repetition_penalty")  # options that need not be whole numbers


class Events:
    """The functions behind the page. The dialogue is kept per visitor, the model is shared."""

    def __init__(self, model: SwitchableModel):
        self._model = model

    def ask(self, question: Message, turns: Turns, compare: bool, *options: str) -> tuple:
        """Add a question to the dialogue, and lock its box until `settle`."""
        text, images = (question.get("text") or "").strip(), question.get("files") or []
        with shown_errors():
            turns = (*turns, make_turn(text, images, compare and self._model.has_adapter))
            self._model.check(prompt_of(turns), self._decoding(options))
        return busy_box(), *_shown(turns)

    def answer(self, turns: Turns, *options: str) -> Iterator[tuple]:
        """Answer the last question as the text grows, with the adapter and then, if asked for, without it."""
        *earlier, last = turns
        with shown_errors():
            prompt, decoding = prompt_of(turns), self._decoding(options)
            for answer in self._model.stream(prompt, decoding):
                last = replace(last, answer=answer)
                yield _shown((*earlier, last))
            last = replace(last, answer=with_picture(self._model.predictor, turns, last.answer))
            if last.is_compared:
                for answer in self._model.stream(prompt, decoding, adapter=False):
                    last = replace(last, base_answer=answer)
                    yield _shown((*earlier, last))
                last = replace(last, base_answer=with_picture(self._model.predictor, turns, last.base_answer))
            yield _shown((*earlier, last))

    def settle(self, turns: Turns) -> tuple:
        """Unlock the box after an answer, an error or a stop; a question without an answer returns to it."""
        if not turns or turns[-1].answer is not None:
            return ready_box(EMPTY_BOX), *_shown(turns)
        *earlier, last = turns
        return ready_box({"text": last.text, "files": list(last.images)}), *_shown(tuple(earlier))

    def look(self, turns: Turns, show: bool, layer: int) -> tuple:
        """Compute where the last answer looks, and draw the mean over its tokens."""
        prompt, answer = prompt_of(turns), turns[-1].answer
        if not (show and prompt.images and answer and answer.token_ids):
            return None, gr.Radio(visible=False), None
        with shown_errors():
            look = self._model.look(prompt, answer)
        titles = [(token_title(token), index) for index, token in enumerate(look.tokens) if token]
        radio = gr.Radio([("all", MEAN), *titles], value=MEAN, visible=True)
        return look, radio, self.draw(look, MEAN, layer)

    def draw(self, look: Look | None, token: int, layer: int) -> Figure | None:
        """Draw one token and one layer, or the means."""
        if look is None:
            return None
        return look.token_figure(None if token == MEAN else token, None if layer == MEAN else layer)

    def clear(self) -> tuple:
        """Begin a new dialogue."""
        return ready_box(EMPTY_BOX), *_shown(()), None, gr.Radio(visible=False), None

    def _decoding(self, options: Sequence[str]) -> Decoding:
        named = {name: _number(name, text) for name, text in zip(OPTIONS, options, strict=True)}
        return self._model.predictor.decoding.updated(**named)


def _number(name: str, text: str) -> float | None:
    """Return the value of an option, None for an empty field. Raises UserError if it is not a number."""
    kind = float if name in FRACTIONS else int
    try:
        return kind(text) if text.strip() else None
    except ValueError:
        expected = "a number" if kind is float else "a whole number"
        raise UserError(f"{name}: expected {expected}, got {text.strip()!r}; correct it") from None


def ready_box(value: Message) -> gr.MultimodalTextbox:
    """Return the question's box as one can write in it."""
    return gr.MultimodalTextbox(value, interactive=True, submit_btn=True, stop_btn=False)


def busy_box() -> gr.MultimodalTextbox:
    """Return the question's box while an answer is written: empty, with a button to stop it."""
    return gr.MultimodalTextbox(EMPTY_BOX, interactive=False, submit_btn=False, stop_btn=True)


@contextmanager
def shown_errors() -> Generator[None]:
    """Show an error that the visitor can fix, on the page and in one line."""
    try:
        yield
    except UserError as error:
        raise _shown_error(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
        raise _shown_error(f"{problem}; ask with fewer images, or lower max_new_tokens") from None


def _shown_error(message: str) -> gr.Error:
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def _shown(turns: Turns) -> tuple:
    return turns, messages_of(turns), base_messages_of(turns)
