"""Dialogues and documents as text with the character spans in the loss, and the chat template in use.

Captions and interleaved documents are written in OpenFlamingo's form whatever the chat template
(arXiv:2308.01390, section 3):

    <image>caption<|endofchunk|></s>
    text<image>text<|endofchunk|><image>text<|endofchunk|></s>

Their loss covers everything from the first image on except images: text, and the end of each chunk. The
language model's own end token is in the loss after a caption, but not after an interleaved document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from flamingo_ft.config import DataSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import EOC_TOKEN, MEDIA_TOKEN
from flamingo_ft.model.chat_template import Span, answer_template, is_marked, jinja_literal, render
from flamingo_ft.model.processor import FlamingoProcessor, begins_with_bos, chunk_template, flatten, is_image
from flamingo_ft.model.special_text import encode_text, protect

from .sample import CHUNK, DOCUMENT, text_message

# An empty dialogue gets the system message too, so that rendering the first n turns gives a prefix of the
# full rendering.
WITH_SYSTEM_PROMPT = (
    "{%- if not messages or messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}"
    "{%- set messages = [{'role': 'system', 'content': PROMPT}] + messages -%}"
    "{% endif %}"
)


def apply_template(processor: FlamingoProcessor, data: DataSection) -> None:
    """Set the processor's chat template, which is saved with it, to the recipe's template and system prompt.

    A template whose generation prompt differs from how it writes answers is corrected (`answer_template`).
    Raises UserError if ``chat`` is set and the language model has no chat template, if its template cannot be
    trained with, and if the template has no place for a system prompt.
    """
    template = _template(processor, data.template)
    if data.system_prompt is None:
        processor.chat_template = _corrected(processor, template)
        return
    if protect(processor.tokenizer, data.system_prompt) != data.system_prompt:
        raise UserError("data.system_prompt: contains the text of a special token; write it without")
    prefix = WITH_SYSTEM_PROMPT.replace("PROMPT", jinja_literal(data.system_prompt))
    _check_system_prompt(processor, data.system_prompt, template, prefix + template)
    processor.chat_template = _corrected(processor, prefix + template)


def render_dialogue(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[Span]]:
    """Return the text of a dialogue and the character spans in the loss.

    Special tokens typed in the dialogue are placeholders in the text.
    """
    turns = [flatten(message, processor.tokenizer) for message in messages]
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    masked = {index for index in answers if turns[index].get("loss") is False}
    if is_marked(cast(str, processor.chat_template)):
        text, spans = _render(processor, turns, marked=True)
        return text, _unmasked(spans, answers, masked) if masked else spans
    text, _ = _render(processor, turns)
    return text, [_answer_span(processor, turns, index, text) for index in answers if index not in masked]


def render_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a dialogue up to where the assistant's answer begins."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    return _render(processor, turns, add_generation_prompt=True)[0]


def answers_rewritten(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether an answer that is trained on is not verbatim in the dialogue's ``text``, whitespace aside."""
    text, position = _without_space(text), 0
    for message in messages:
        if message["role"] == "assistant" and message.get("loss") is not False:
            answer = _without_space(flatten(message, processor.tokenizer)["content"])
            position = text.find(answer, position)
            if position < 0:
                return True
            position += len(answer)
    return False


def is_document(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this is a document. Raises UserError if it stands among other messages."""
    documents = sum(message["role"] == DOCUMENT for message in messages)
    if documents and len(messages) > 1:
        raise UserError(
            f"messages: got a {DOCUMENT} among {len(messages)} messages; let it stand alone in its sample"
        )
    return documents > 0


def render_document(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[Span]]:
    """Return the text of a document and the character spans in the loss.

    Special tokens typed in the document are placeholders in the text.
    """
    text = _chunks(processor, messages) + EOC_TOKEN
    start = text.find(MEDIA_TOKEN)
    end = processor.tokenizer.eos_token or ""
    if start < 0:
        return text + end, []
    is_caption = text.count(MEDIA_TOKEN) == 1 and start == len(_bos(processor))
    return text + end, [(start, len(text + end) if is_caption else len(text))]


def render_document_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a document up to its last image, for the model to continue; else all of it."""
    before, image, after = _chunks(processor, messages).rpartition(MEDIA_TOKEN)
    return before + image if image else after


def render_chunks(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a few-shot prompt: chunks as in a document, the last one for the model to continue.

    Whitespace is kept: it is part of the prompts that OpenFlamingo is evaluated with.
    """
    chunks = (flatten(message, processor.tokenizer)["content"] for message in messages)
    return _bos(processor) + EOC_TOKEN.join(chunks)


def is_few_shot(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this is a few-shot prompt. Raises UserError if only some messages are chunks."""
    chunks = sum(message["role"] == CHUNK for message in messages)
    if chunks not in (0, len(messages)):
        raise UserError(
            f"messages: got {chunks} of {len(messages)} with role {CHUNK}; give all or none this role"
        )
    return chunks > 0


def first_chunks(message: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the document up to its ``count``-th image and the text after it."""
    content = message["content"]
    images = [index for index, block in enumerate(content) if is_image(block)]
    return {**message, "content": content[: images[count]] if count < len(images) else content}


def _template(processor: FlamingoProcessor, name: str) -> str:
    """Return the template that ``data.template`` names."""
    has_own = processor.tokenizer.chat_template is not None
    if name == "chat" and not has_own:
        raise UserError(
            "data.template: got chat, but the language model has no chat template; set it to auto or flamingo"
        )
    if name == "flamingo" or not has_own:
        return chunk_template(processor.tokenizer)
    return processor.tokenizer.get_chat_template()


def _corrected(processor: FlamingoProcessor, template: str) -> str:
    """Return the template to write with. Raises UserError if the language model's cannot be trained with."""
    corrected = answer_template(processor.tokenizer, template)
    if corrected.problem:
        raise UserError(
            f"data.template: the language model's chat template {corrected.problem}; "
            "set data.template to flamingo"
        )
    return corrected.text


def _check_system_prompt(processor: FlamingoProcessor, prompt: str, template: str, prompted: str) -> None:
    """Raise UserError if ``prompted``, the template with the system prompt, refuses or ignores it.

    It need not write the whole prompt: SmolLM3's, for one, takes out "/no_think" and turns off reasoning.
    """
    remedy = "set it to null, or data.template to flamingo"
    dialogue = [text_message("user", "a"), text_message("assistant", "b")]
    try:
        processor.chat_template = prompted
        text, _ = render_dialogue(processor, dialogue)
    except UserError as error:
        raise UserError(f"data.system_prompt: {error}; {remedy}") from None
    processor.chat_template = template
    if prompt.strip() not in text and text == _rendered_or_none(processor, dialogue):
        raise UserError(f"data.system_prompt: the chat template leaves out a system message; {remedy}")


def _rendered_or_none(processor: FlamingoProcessor, dialogue: list[dict]) -> str | None:
    """Return the text of a dialogue; None if the template refuses it, as some do without a system message."""
    try:
        return render_dialogue(processor, dialogue)[0]
    except UserError:
        return None


def _render(processor: FlamingoProcessor, turns: list[dict], **options: bool) -> tuple[str, list[Span]]:
    return render(processor.answer_template, processor.tokenizer.special_tokens_map, turns, **options)


def _without_space(text: str) -> str:
    return "".join(text.split())


def _unmasked(spans: list[Span], answers: list[int], masked: set[int]) -> list[Span]:
    """Return the spans of the assistant turns that are not masked."""
    if len(spans) != len(answers):
        raise UserError(
            f"chat template: marks {len(spans)} parts as the assistant's in a dialogue of {len(answers)} "
            "assistant turns, so the turn that is not trained on is ambiguous; use a template that marks "
            "each turn once"
        )
    return [span for span, index in zip(spans, answers, strict=True) if index not in masked]


def _answer_span(processor: FlamingoProcessor, turns: list[dict], index: int, text: str) -> Span:
    """Return where assistant turn ``index`` is in ``text``, from its first word to its end token."""
    before, _ = _render(processor, turns[:index], add_generation_prompt=True)
    is_last = index + 1 == len(turns)
    through = (text if is_last else _render(processor, turns[: index + 1])[0]).rstrip()
    if text.startswith(through) and through.startswith(before):
        return len(before), len(through)
    return _answer_span_by_marker(processor, turns, index, text, before)


def _answer_span_by_marker(
    processor: FlamingoProcessor, turns: list[dict], index: int, text: str, before: str
) -> Span:
    """Return the span of a turn that the template writes differently if turns follow it.

    The answer is replaced by a marker: the texts before and after the marker bound the answer.
    """
    marker = "qzanswer"
    while marker in text:
        marker += "z"
    replaced = [*turns[:index], {**turns[index], "content": marker}, *turns[index + 1 :]]
    head, found, tail = _render(processor, replaced)[0].partition(marker)
    head = before if text.startswith(before) else head.rstrip(" ")
    through = len(text) - len(tail)
    if not (found and text.endswith(tail) and len(tail) < len(text)):
        raise UserError(
            "chat template: cannot locate the assistant's answers (it rewrites earlier turns); mark them "
            "with {% generation %} in the tokenizer's chat template, or set data.template to flamingo"
        )
    if not (text.startswith(head) and len(head) <= through):
        raise UserError(
            f"chat template: begins the answer in message {index} differently than its generation prompt "
            "does, perhaps with reasoning; remove the reasoning from answers, or set data.template to "
            "flamingo"
        )
    alone = _render(processor, replaced[: index + 1])[0].rpartition(marker)[2]
    end = text[: through + _common_prefix(processor, tail, alone)].rstrip()
    return len(head), max(len(head), len(end))


def _common_prefix(processor: FlamingoProcessor, tail: str, alone: str) -> int:
    """Return how many characters two texts begin with alike, in whole tokens.

    With ``tail`` after an answer in the dialogue, and ``alone`` after it as the last turn, this is the
    answer's end token.
    """
    shared = 0
    ours, theirs = (encode_text(processor.tokenizer, text) for text in (tail[: len(alone)], alone))
    for token, other, (_, stop) in zip(ours.ids, theirs.ids, ours.offsets, strict=False):
        if token != other:
            break
        shared = stop
    return shared


def _chunks(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a document without its last end of chunk.

    A chunk ends before every image but the first; whitespace around images and ends is removed, as in
    OpenFlamingo.
    """
    before, *chunks = flatten(messages[0], processor.tokenizer)["content"].split(MEDIA_TOKEN)
    joined = EOC_TOKEN.join(MEDIA_TOKEN + chunk.strip() for chunk in chunks)
    return _bos(processor) + before.strip() + joined


def _bos(processor: FlamingoProcessor) -> str:
    return processor.tokenizer.bos_token if begins_with_bos(processor.tokenizer) else ""
