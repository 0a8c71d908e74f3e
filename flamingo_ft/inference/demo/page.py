"""The page in Gradio: its components, where they stand, and which event calls which function."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .events import MEAN, OPTIONS, Events
from .switchable_model import SwitchableModel

LOOK_HELP = (
    "Attention of the answer over the patches of the images{}. It shows what is read, not what decides the "
    "answer."
)
PLACEHOLDER = "Add images and ask; images without a question are captioned"
BROWSER = "private"  # visibility of events that only the page itself needs


@dataclass(frozen=True)
class DialogueView:
    """The components of the dialogue. turns: its state; base_chat: the answers without the adapter."""

    turns: gr.State
    chat: gr.Chatbot
    base_chat: gr.Chatbot
    question: gr.MultimodalTextbox
    compare: gr.Checkbox
    clear: gr.Button
    options: list[gr.Textbox]


@dataclass(frozen=True)
class LookView:
    """The components that show where the last answer looks. look: its state."""

    look: gr.State
    show: gr.Checkbox
    token: gr.Radio
    layer: gr.Dropdown
    picture: gr.Plot


def build_page(model: SwitchableModel, name: str, examples: Sequence[dict[str, Any]] = ()) -> gr.Blocks:
    """Return the page of a model. examples: values of the question's box."""
    with gr.Blocks(title=f"{name} - flamingo_ft", analytics_enabled=False) as page:
        gr.HTML(f"<h2>{html.escape(name)}</h2>")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                dialogue = _dialogue(model, examples)
            with gr.Column(scale=2, min_width=320):
                view = _look_view(model)
        _connect_dialogue(Events(model), dialogue, view)
    return page.queue(default_concurrency_limit=1)


def _dialogue(model: SwitchableModel, examples: Sequence[dict[str, Any]]) -> DialogueView:
    with gr.Row():
        chat = _chat("With the adapter" if model.has_adapter else "Answers", "answers")
        base_chat = _chat("Without the adapter", "base-answers", visible="hidden")
    question = gr.MultimodalTextbox(
        placeholder=PLACEHOLDER, file_types=["image"], file_count="multiple", show_label=False,
        elem_id="question", autofocus=True,
    )  # fmt: skip
    with gr.Row():
        compare = gr.Checkbox(
            label="Answer without the adapter too", visible=model.has_adapter, container=False,
            elem_id="compare",
        )  # fmt: skip
        clear = gr.Button("New dialogue", size="sm", elem_id="clear", min_width=120, scale=0)
    if examples:
        gr.Examples([[example] for example in examples], [question], label="Held-out questions of this run")
    with gr.Accordion("Decoding", open=False, elem_id="options"), gr.Row():
        options = [_option(model, name) for name in OPTIONS]
    return DialogueView(gr.State(()), chat, base_chat, question, compare, clear, options)


def _chat(label: str, elem_id: str, visible: Any = True) -> gr.Chatbot:
    return gr.Chatbot(
        label=label, elem_id=elem_id, elem_classes="chat", height=420, min_width=280, visible=visible,
        render_markdown=False, buttons=["copy", "copy_all"],
    )  # fmt: skip


def _option(model: SwitchableModel, name: str) -> gr.Textbox:
    """Return the field of a decoding option, under transformers' name.

    A field of text, because Gradio's field for numbers turns an empty one into 0.
    """
    value = getattr(model.predictor.decoding, name)
    return gr.Textbox("" if value is None else str(value), label=name, info=OPTIONS[name], min_width=150)


def _look_view(model: SwitchableModel) -> LookView:
    info = LOOK_HELP.format(", through the perceiver" if model.has_perceiver else "")
    show = gr.Checkbox(True, label="Show where the answer looks", info=info, elem_id="show-look")
    picture = gr.Plot(show_label=False, elem_id="look")
    token = gr.Radio([], label="Token of the answer", visible=False, elem_id="token")
    layers = [(f"before decoder layer {layer}", layer) for layer in model.layers]
    layer = gr.Dropdown(
        [("mean of all layers", MEAN), *layers], value=MEAN, label="Cross-attention", elem_id="layer"
    )
    return LookView(gr.State(None), show, token, layer, picture)


def _connect_dialogue(events: Events, dialogue: DialogueView, view: LookView) -> None:
    """Let a question be checked, answered and looked at, one after the other; errors end the chain."""
    turns, question, options = dialogue.turns, dialogue.question, dialogue.options
    shown = [turns, dialogue.chat, dialogue.base_chat]
    looked_at = [view.look, view.token, view.picture]
    model: Any = {"concurrency_id": "model"}  # one at a time
    asked = question.submit(
        events.ask, [question, turns, dialogue.compare, *options], [question, *shown], api_name="ask", **model
    )
    answered = asked.success(events.answer, [turns, *options], shown, api_name="answer", **model)
    answered.then(events.settle, turns, [question, *shown], api_visibility=BROWSER)
    looked = answered.success(
        events.look, [turns, view.show, view.layer], looked_at, api_name="look", **model
    )
    question.stop(None, cancels=[answered])
    gr.on(
        [dialogue.clear.click, dialogue.chat.clear, dialogue.base_chat.clear],
        events.clear, None, [question, *shown, *looked_at], cancels=[answered, looked], api_name="clear",
    )  # fmt: skip
    dialogue.compare.change(
        lambda on: gr.Chatbot(visible=True if on else "hidden"),
        dialogue.compare, dialogue.base_chat, api_visibility=BROWSER,
    )  # fmt: skip
    gr.on(
        [view.token.input, view.layer.input],
        events.draw, [view.look, view.token, view.layer], view.picture, api_name="draw",
    )  # fmt: skip
