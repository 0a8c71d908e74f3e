"""Captions and interleaved documents in OpenFlamingo's form, whatever the chat template (arXiv:2308.01390, section 3).

    <image>caption<|endofchunk|></s>
    text<image>text<|endofchunk|><image>text<|endofchunk|></s>

Loss is on everything from the first image on but images: text, and the end of each chunk. The language model's own end
token is learned after a caption, and not after an interleaved document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import EOC_TOKEN, MEDIA_TOKEN
from flamingo_ft.model.processor import FlamingoProcessor, begins_with_bos, flatten, is_image

from .sample import DOCUMENT


def is_document(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this is a document. Raises UserError where one stands among other messages."""
    found = [message["role"] == DOCUMENT for message in messages]
    if any(found) and len(found) > 1:
        raise UserError(
            f"messages: found a {DOCUMENT} among {len(found)} messages; let it stand alone in its sample"
        )
    return any(found)


def write_document(
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


def write_beginning(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
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
