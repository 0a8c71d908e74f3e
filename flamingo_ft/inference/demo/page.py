"""The page of the demo, in Gradio: its components, and what happens to a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from torch import Tensor

from flamingo_ft.adapters.switched_off import switched_off
from flamingo_ft.data.sample import text_message
from flamingo_ft.errors import UserError
from flamingo_ft.inference.look import Look
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.inference.prompts import Prompt, place_images

AVERAGE = "average of all layers"
LOOK_HELP = (
    "Attention of each token of the answer over the images, through the perceiver to the visual tokens. "
    "It shows what was read, not what decided."
)
Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the answers with the adapter and without it."""

    text: str
    images: tuple[str, ...]
    answer: str = ""
    answer_without: str = ""


def build_page(
    predictor: Predictor,
    name: str,
    examples: Sequence[Message] = (),
    bridge: Mapping[str, Tensor] | None = None,
) -> gr.Blocks:
    """Return the page of a model. bridge: `base_bridge` of an adapter; None without an adapter."""
    page = _Page(predictor, bridge)
    with gr.Blocks(title=name, analytics_enabled=False) as blocks:
        turns, look = gr.State(()), gr.State(None)
        gr.Markdown(f"## {name}")
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Row():
                    chat = gr.Chatbot(label="answers", elem_id="answers")
                    chat_without = gr.Chatbot(label="without the adapter", visible=False)
                question = gr.MultimodalTextbox(
                    placeholder="Add images and ask", file_types=["image"], file_count="multiple",
                    show_label=False, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    compare = gr.Checkbox(
                        label="answer without the adapter too", visible=bridge is not None, container=False
                    )
                    show_look = gr.Checkbox(True, label="show where it looks", container=False)
                    clear = gr.Button("New dialogue", size="sm")
                if examples:
                    gr.Examples([[example] for example in examples], [question], label="held-out questions")
            with gr.Column(scale=2):
                layer = gr.Dropdown([AVERAGE], value=AVERAGE, label="Where it looks", info=LOOK_HELP)
                picture = gr.Plot(show_label=False, elem_id="look")
        compare.change(lambda on: gr.Chatbot(visible=on), compare, chat_without, api_visibility="private")
        asked = question.submit(
            page.ask, [question, turns], [turns, question, chat, chat_without], api_name="ask"
        )
        answered = asked.success(
            page.answer,
            [turns, compare],
            [turns, chat, chat_without],
            api_name="answer",
            concurrency_id="model",
        )
        answered.success(
            page.look, [turns, show_look], [look, layer, picture], api_name="look", concurrency_id="model"
        )
        layer.input(page.draw, [look, layer], picture, api_name="draw")
        clear.click(
            lambda: ((), None, [], [], None),
            None,
            [turns, look, chat, chat_without, picture],
            api_name="clear",
        )
    return blocks.queue(default_concurrency_limit=1)


class _Page:
    """What the page does; the dialogue is kept per visitor, the model is shared."""

    def __init__(self, predictor: Predictor, bridge: Mapping[str, Tensor] | None):
        self._predictor, self._bridge = predictor, bridge

    def ask(self, question: Message, turns: tuple[Turn, ...]) -> tuple:
        """Add a question to the dialogue."""
        images, text = tuple(map(_path, question.get("files") or ())), (question.get("text") or "").strip()
        if not text and not images:
            raise gr.Error("ask something, or add an image")
        turns = (*turns, Turn(text, images))
        with _shown_errors():
            self._predictor.encode([prompt_of(turns)])
        return turns, {"text": "", "files": []}, messages_of(turns), messages_of(turns, without=True)

    def answer(self, turns: tuple[Turn, ...], compare: bool) -> Iterator[tuple]:
        """Answer the last question, with the adapter and, if ``compare``, without it."""
        *earlier, last = turns
        without = compare and self._bridge is not None
        with _shown_errors():
            for text in self._streamed(turns, nullcontext):
                last = replace(last, answer=text)
                yield self._shown((*earlier, last))
            if without:
                for text in self._streamed(turns, self._switched_off, without=True):
                    last = replace(last, answer_without=text)
                    yield self._shown((*earlier, last))
        yield self._shown((*earlier, last))

    def look(self, turns: tuple[Turn, ...], show: bool) -> tuple:
        """Show where the last answer looks."""
        prompt = prompt_of(turns)
        if not show or not prompt.images:
            return None, gr.Dropdown([AVERAGE], value=AVERAGE), None
        with _shown_errors():
            look = self._predictor.look_at(prompt)
        layers = [AVERAGE, *(f"before decoder layer {layer}" for layer in look.layers)]
        return look, gr.Dropdown(layers, value=AVERAGE), look.figure()

    def draw(self, look: Look | None, layer: str) -> Any:
        """Draw one layer, or the average."""
        if look is None:
            return None
        return look.figure(None if layer == AVERAGE else int(layer.rsplit(" ", 1)[1]))

    def _streamed(
        self,
        turns: tuple[Turn, ...],
        context: Callable[[], AbstractContextManager[None]],
        without: bool = False,
    ) -> Iterator[str]:
        """Yield the answer as it grows."""
        text = ""
        with context():
            for piece in self._predictor.stream_answer(prompt_of(turns, without)):
                text += piece
                yield text

    def _switched_off(self) -> AbstractContextManager[None]:
        assert self._bridge is not None, "only compared if there is an adapter"
        return switched_off(self._predictor.model, self._bridge)

    @staticmethod
    def _shown(turns: tuple[Turn, ...]) -> tuple:
        return turns, messages_of(turns), messages_of(turns, without=True)


def prompt_of(turns: Sequence[Turn], without: bool = False) -> Prompt:
    """Return the dialogue up to its last question. without: with the answers of the model without adapter."""
    messages: list[dict[str, Any]] = []
    images: list[str] = []
    for number, turn in enumerate(turns):
        content = (
            place_images(turn.text, len(turn.images)) if turn.text else [{"type": "image"}] * len(turn.images)
        )
        messages.append({"role": "user", "content": content})
        images += turn.images
        answer = turn.answer_without if without else turn.answer
        if number < len(turns) - 1:
            messages.append(text_message("assistant", answer))
    return Prompt(messages, images, "question")


def messages_of(turns: Sequence[Turn], without: bool = False) -> list[Message]:
    """Return the dialogue as the chat shows it."""
    messages: list[Message] = []
    for turn in turns:
        messages += [{"role": "user", "content": {"path": image}} for image in turn.images]
        if turn.text:
            messages.append({"role": "user", "content": turn.text})
        answer = turn.answer_without if without else turn.answer
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages


def _path(file: Any) -> str:
    return file if isinstance(file, str) else file["path"]


class _shown_errors:
    """Show an error of the user on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise gr.Error(str(error)) from None
