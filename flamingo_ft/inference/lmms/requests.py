"""lmms-eval's requests in this package's terms: prompts, and options of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo_ft.data.sample import Video
from flamingo_ft.data.sources.tar_samples import IMAGES
from flamingo_ft.errors import UserError
from flamingo_ft.inference.decoding import BEAMS, SAMPLING
from flamingo_ft.inference.prompts import Prompt, place_images

COPIED = ("num_beams", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
READ = {*COPIED, *BEAMS, *SAMPLING, "max_new_tokens", "do_sample", "until"}  # keys that have an effect


def chat_prompt(messages: Sequence[Any], where: str) -> Prompt:
    """Return the prompt of lmms-eval's ``ChatMessages``: typed blocks, in each its text or the medium itself.

    Raises UserError, beginning with ``where``, for audio and for a part of a video.
    """
    turns: list[dict[str, Any]] = []
    media: list[Any] = []
    for message in messages:
        blocks = []
        for content in message.content:
            if content.type == "text":
                blocks.append({"type": "text", "text": content.text})
            else:
                blocks.append({"type": "image"})
                media.append(_chat_medium(content, where))
        turns.append({"role": message.role, "content": blocks})
    return Prompt(turns, media, where)


def simple_prompt(text: str, visuals: Sequence[Any] | None, where: str) -> Prompt:
    """Return the prompt of a text and what ``doc_to_visual`` returned: images, paths of images or of videos.

    ``<image>`` in the text marks where each belongs; without markers, they come first. Raises UserError,
    beginning with ``where``, if their numbers differ, and for audio.
    """
    media = [_simple_medium(visual, where) for visual in visuals or ()]
    try:
        blocks = place_images(text, len(media))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Prompt([{"role": "user", "content": blocks}], media, where)


def decoding_options(given: Mapping[str, Any], longest: int | None) -> dict[str, Any]:
    """Return the options of `Decoding` for a task's ``generation_kwargs``; keys outside `READ` are ignored.

    Decoding is greedy without a temperature, with a temperature or ``top_p`` of 0, and with ``do_sample:
    false``. longest: most tokens of an answer; a task may set fewer.
    """
    names = list(COPIED)
    if (given.get("num_beams") or 1) > 1:
        names += BEAMS
    if given.get("do_sample") is not False and given.get("temperature") and given.get("top_p") != 0:
        names += SAMPLING
    options = {name: given[name] for name in names if given.get(name) is not None}
    until = given.get("until") or ()
    options["stop_strings"] = tuple(filter(None, [until] if isinstance(until, str) else until))
    lengths = [length for length in (given.get("max_new_tokens"), longest) if length is not None]
    return options | ({"max_new_tokens": min(lengths)} if lengths else {})


def _chat_medium(content: Any, where: str) -> Any:
    if content.type == "image":
        return content.url
    if content.type != "video":
        raise UserError(f"{where}: got {content.type}, which the model cannot take; choose another task")
    if not isinstance(content.url, str) or content.start_time is not None or content.end_time is not None:
        raise UserError(f"{where}: got a part of a video; choose a task of whole video files")
    return Video(file=content.url)


def _simple_medium(visual: Any, where: str) -> Any:
    if isinstance(visual, dict):
        raise UserError(f"{where}: got audio, which the model cannot take; choose another task")
    if isinstance(visual, str) and Path(visual).suffix.lower().removeprefix(".") not in IMAGES:
        return Video(file=visual)
    return visual
