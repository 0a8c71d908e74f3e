"""A dialogue as its chat template writes it, and which characters are the assistant's.

Captions and interleaved documents in OpenFlamingo's form, whatever the chat template (arXiv:2308.01390, section 3).

    <image>caption<|endofchunk|></s>
    text<image>text<|endofchunk|><image>text<|endofchunk|></s>

Loss is on everything from the first image on but images: text, and the end of each chunk. The language model's own end
token is learned after a caption, and not after an interleaved document.


How the recipe wants dialogues written as text: set once on the processor, and saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.config import DataSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import EOC_TOKEN, MEDIA_TOKEN
from flamingo_ft.model.chat_template import Span, answer_template, is_marked, jinja_literal, render
from flamingo_ft.model.processor import FlamingoProcessor, begins_with_bos, chunk_template, flatten, is_image
from flamingo_ft.model.special_text import encode_text, protect

from .sample import DOCUMENT, text_message


def render_dialogue(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[Span]]:
    """The text of a dialogue, stand-ins for typed special tokens in it, and the characters with loss."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    speaking = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    silent = {index for index in speaking if turns[index].get("loss") is False}
    if is_marked(processor.chat_template):
        text, spans = _render(processor, turns, marked=True)
        return text, _without(spans, speaking, silent) if silent else spans
    text, _ = _render(processor, turns)
    return text, [_span(processor, turns, index, text) for index in speaking if index not in silent]


def render_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a dialogue up to where the assistant is to speak."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    return _render(processor, turns, add_generation_prompt=True)[0]


def answers_are_rewritten(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]], text: str
) -> bool:
    """Whether an answer with loss does not stand in the dialogue's ``text`` as it is, white space aside."""
    words, place = _without_space(text), 0
    for message in messages:
        if message["role"] == "assistant" and message.get("loss") is not False:
            answer = _without_space(flatten(message, processor.tokenizer)["content"])
            place = words.find(answer, place)
            if place < 0:
                return True
            place += len(answer)
    return False


def _without_space(text: str) -> str:
    return "".join(text.split())


def _without(spans: list[Span], speaking: list[int], silent: set[int]) -> list[Span]:
    """The spans of the turns that are learned."""
    if len(spans) != len(speaking):
        raise UserError(
            f"chat template: marks {len(spans)} parts as the assistant's among {len(speaking)} such turns, "
            "so it cannot be told which is the one without loss; use a template that marks each turn once"
        )
    return [span for span, index in zip(spans, speaking, strict=True) if index not in silent]


def _span(processor: FlamingoProcessor, turns: list[dict], index: int, text: str) -> Span:
    """Where assistant turn ``index`` stands in ``text``, from its first word to its end token."""
    before, _ = _render(processor, turns[:index], add_generation_prompt=True)
    through, _ = _render(processor, turns[: index + 1])
    through = through.rstrip()
    if text.startswith(through) and through.startswith(before):
        return len(before), len(through)
    return _span_by_marker(processor, turns, index, text, before)


def _span_by_marker(
    processor: FlamingoProcessor, turns: list[dict], index: int, text: str, before: str
) -> Span:
    """The span of a turn that the template writes otherwise when turns follow it: where another answer would stand."""
    marker = "qzanswer"
    while marker in text:
        marker += "z"
    replaced = [*turns[:index], {**turns[index], "content": marker}, *turns[index + 1 :]]
    head, found, tail = _render(processor, replaced)[0].partition(marker)
    head = before if text.startswith(before) else head.rstrip(" ")
    through = len(text) - len(tail)
    if not (found and text.endswith(tail) and len(tail) < len(text)):
        raise UserError(
            "chat template: cannot locate the assistant's answers (it rewrites earlier turns); mark them with "
            "{% generation %} in the tokenizer's chat template, or set data.template to flamingo"
        )
    if not (text.startswith(head) and len(head) <= through):
        raise UserError(
            "chat template: begins an answer otherwise than its prompt for answers does (with its reasoning, perhaps), "
            f"got it in message {index}; remove the reasoning from answers, or set data.template to flamingo"
        )
    alone = _render(processor, replaced[: index + 1])[0].rpartition(marker)[2]
    end = text[: through + _shared(processor, tail, alone)].rstrip()
    return len(head), max(len(head), len(end))


def _shared(processor: FlamingoProcessor, tail: str, end: str) -> int:
    """How many characters ``tail`` and ``end`` begin with alike, in whole tokens: an answer's end, whatever follows."""
    shared = 0
    ours, theirs = (encode_text(processor.tokenizer, text) for text in (tail[: len(end)], end))
    for token, other, (_, stop) in zip(ours.ids, theirs.ids, ours.offsets, strict=False):
        if token != other:
            break
        shared = stop
    return shared


def _render(processor: FlamingoProcessor, turns: list[dict], **options: bool) -> tuple[str, list[Span]]:
    return render(processor.answer_template, processor.tokenizer.special_tokens_map, turns, **options)


def is_document(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this is a document. Raises UserError where one stands among other messages."""
    found = [message["role"] == DOCUMENT for message in messages]
    if any(found) and len(found) > 1:
        raise UserError(
            f"messages: got a {DOCUMENT} among {len(found)} messages; let it stand alone in its sample"
        )
    return any(found)


def render_document(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a document, stand-ins for typed special tokens in it, and the characters with loss."""
    text = _chunks(processor, messages) + EOC_TOKEN
    begin = text.find(MEDIA_TOKEN)
    end = processor.tokenizer.eos_token or ""
    if begin < 0:
        return text + end, []
    is_caption = text.count(MEDIA_TOKEN) == 1 and begin == len(_beginning(processor))
    return text + end, [(begin, len(text + end) if is_caption else len(text))]


def render_document_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a document up to its last image, which the model is to go on from; all of it where there is none."""
    before, image, after = _chunks(processor, messages).rpartition(MEDIA_TOKEN)
    return before + image if image else after


def first_chunks(message: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The document up to its ``count``-th image and the text after it."""
    content = message["content"]
    images = [index for index, block in enumerate(content) if is_image(block)]
    return {**message, "content": content[: images[count]] if count < len(images) else content}


def _chunks(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """A chunk ends before every image but the first; no white space around images and ends, as OpenFlamingo cleans."""
    before, *chunks = flatten(messages[0], processor.tokenizer)["content"].split(MEDIA_TOKEN)
    chunks = EOC_TOKEN.join(MEDIA_TOKEN + chunk.strip() for chunk in chunks)
    return _beginning(processor) + before.strip() + chunks


def _beginning(processor: FlamingoProcessor) -> str:
    return processor.tokenizer.bos_token if begins_with_bos(processor.tokenizer) else ""


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
        raise UserError("data.system_prompt: got a special token's text in it; write it without")
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
            "data.template: got chat, but the language model has no chat template; set it to auto or flamingo"
        )
    if wanted == "flamingo" or not has_own:
        return chunk_template(processor.tokenizer)
    return processor.tokenizer.get_chat_template()


def _check_system_prompt(processor: FlamingoProcessor, prompt: str) -> None:
    remedy = "set it to null, or data.template to flamingo"
    try:
        text, _ = render_dialogue(processor, [text_message("user", "a"), text_message("assistant", "b")])
    except UserError as error:
        raise UserError(f"data.system_prompt: {error}; {remedy}") from None
    if prompt.strip() not in text:
        raise UserError(f"data.system_prompt: the chat template leaves out a system message; {remedy}")
