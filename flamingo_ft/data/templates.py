"""How the recipe wants dialogues written as text: set once on the processor, and saved with it."""

from __future__ import annotations

from flamingo_ft.config import DataSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.chat_template import answer_template, jinja_literal
from flamingo_ft.model.processor import FlamingoProcessor, chunk_template
from flamingo_ft.model.special_text import protect

from .dialogue import write_dialogue
from .encode import text_message

# An empty dialogue gets the system message too: what is written of a dialogue's first turns begins as the whole does.
WITH_SYSTEM_PROMPT = (
    "{%- if not messages or messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}"
    "{%- set messages = [{'role': 'system', 'content': PROMPT}] + messages -%}"
    "{% endif %}"
)


def apply_template(processor: FlamingoProcessor, data: DataSection) -> None:
    """Set the processor's chat template as ``data.template`` and ``data.system_prompt`` say.

    A template whose prompt for an answer is not how it writes answers is set corrected (`answer_template`). Raises
    UserError where the language model has no chat template but one is requested, where its template cannot be trained
    with, and where the template has no use for a system prompt.
    """
    template = _template(processor, data.template)
    if data.system_prompt is None:
        processor.chat_template = _checked(processor, template)
        return
    if protect(processor.tokenizer, data.system_prompt) != data.system_prompt:
        raise UserError("data.system_prompt: found a special token's text in it; write it without")
    processor.chat_template = (
        WITH_SYSTEM_PROMPT.replace("PROMPT", jinja_literal(data.system_prompt)) + template
    )
    _check_system_prompt(processor, data.system_prompt)
    processor.chat_template = _checked(processor, processor.chat_template)


def _checked(processor: FlamingoProcessor, template: str) -> str:
    """The template to write with. Raises UserError where there is none."""
    found = answer_template(processor.tokenizer, template)
    if found.problem:
        raise UserError(
            f"data.template: the language model's chat template {found.problem}; set data.template to flamingo"
        )
    return found.text


def _template(processor: FlamingoProcessor, wanted: str) -> str:
    has_own = processor.tokenizer.chat_template is not None
    if wanted == "chat" and not has_own:
        raise UserError(
            "data.template: found chat, but the language model has no chat template; set it to auto or flamingo"
        )
    if wanted == "flamingo" or not has_own:
        return chunk_template(processor.tokenizer)
    return processor.tokenizer.get_chat_template()


def _check_system_prompt(processor: FlamingoProcessor, prompt: str) -> None:
    remedy = "set it to null, or data.template to flamingo"
    try:
        text, _ = write_dialogue(processor, [text_message("user", "a"), text_message("assistant", "b")])
    except UserError as error:
        raise UserError(f"data.system_prompt: {error}; {remedy}") from None
    if prompt.strip() not in text:
        raise UserError(f"data.system_prompt: the chat template leaves out a system message; {remedy}")
