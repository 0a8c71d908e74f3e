"""Drafts to samples: roles checked, each image matched with its place, nothing opened yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flamingo_ft.data.locate import Locator
from flamingo_ft.data.sample import DOCUMENT, ROLES, UNNAMED_TASK, Medium, Sample
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .blocks import VIDEO_MARKER, Part, Place, read_content, typed
from .draft import Draft, Given, Turn


def compose(draft: Draft, task: str | None, where: str, locator: Locator) -> Sample:
    """The sample of a row. UserError naming the field in which something is wrong."""
    check_roles(draft.turns, where)
    contents = [read_content(turn.content, turn.where, bool(draft.videos)) for turn in draft.turns]
    contents = _placed(draft, contents, where)
    media = [
        _located(part.medium, part.video, locator)
        for content in contents
        for part in content
        if isinstance(part, Place)
    ]
    messages = [_message(turn, content) for turn, content in zip(draft.turns, contents, strict=True)]
    return Sample(messages, media, task or UNNAMED_TASK, where, _rejected(draft))


def check_roles(turns: Sequence[Turn], where: str) -> None:
    """A dialogue: a system message at most first, then user and assistant in turn, the user first. Or one document."""
    roles = [turn.role for turn in turns]
    if roles == [DOCUMENT]:
        return
    for turn in turns:
        if turn.role not in ROLES:
            raise UserError(f"{turn.where}: found the role {turn.role!r}, wanted one of {', '.join(ROLES)}")
    if "assistant" not in roles:
        raise UserError(f"{_dialogue(turns, where)}: found no assistant turn, wanted one to learn from")
    previous = "system"
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise UserError(f"{turn.where}: found a system message here, wanted it first; move or join it")
        if turn.role == "assistant" and previous == "system":
            raise UserError(
                f"{_dialogue(turns, where)}: found an assistant turn first, wanted what it answers before it"
            )
        if turn.role == previous and index > 0:
            raise UserError(
                f"{turn.where}: found {turn.role} after {turn.role}, wanted user and assistant in turn; join them"
            )
        previous = turn.role


def _dialogue(turns: Sequence[Turn], where: str) -> str:
    """The field of a dialogue: that of its first turn, without its number."""
    return turns[0].where.partition("[")[0] if turns else where


def _placed(draft: Draft, contents: list[list[Part]], where: str) -> list[list[Part]]:
    """The contents with a medium in every place."""
    open_places = [
        part for content in contents for part in content if isinstance(part, Place) and part.medium is None
    ]
    if not open_places and (draft.images or draft.videos):
        first = next((i for i, turn in enumerate(draft.turns) if turn.role == "user"), 0)
        contents[first] = [*_filled(draft), *contents[first]]  # before the first user turn, as in TRL
        return contents
    if any(place.video for place in open_places):
        _check_count(
            sum(not place.video for place in open_places), len(draft.images), MEDIA_TOKEN, "images", where
        )
        _check_count(
            sum(place.video for place in open_places), len(draft.videos), VIDEO_MARKER, "videos", where
        )
        queues = {False: iter(_filled(draft, videos=False)), True: iter(_filled(draft, images=False))}
    else:
        found = len(draft.images) + len(draft.videos)
        _check_count(
            len(open_places), found, MEDIA_TOKEN, "images" if not draft.videos else "images and videos", where
        )
        queues = dict.fromkeys((False, True), iter(_filled(draft)))
    return [[_fill(part, queues) for part in content] for content in contents]


def _filled(draft: Draft, images: bool = True, videos: bool = True) -> list[Place]:
    chosen = [Place(False, one) for one in draft.images if images]
    return chosen + [Place(True, one) for one in draft.videos if videos]


def _fill(part: Part, queues: dict[bool, Iterator[Place]]) -> Part:
    return next(queues[part.video]) if isinstance(part, Place) and part.medium is None else part


def _check_count(markers: int, media: int, marker: str, noun: str, where: str) -> None:
    if markers != media:
        remedy = f"add the missing {noun} or remove markers"
        raise UserError(f"{where}: found {markers} {marker} markers but {media} {noun}; {remedy}")


def _located(medium: Given, video: bool, locator: Locator) -> Medium:
    return locator.video(medium.value, medium.where) if video else locator.image(medium.value, medium.where)


def _message(turn: Turn, content: Sequence[Part]) -> dict[str, Any]:
    message = {"role": turn.role, "content": [typed(part) for part in content]}
    return message if turn.loss else {**message, "loss": False}


def _rejected(draft: Draft) -> list[dict[str, Any]] | None:
    """The messages of the worse answer, words alone: images belong to what both answer."""
    if draft.rejected is None:
        return None
    contents = [read_content(turn.content, turn.where, False) for turn in draft.rejected]
    for turn, content in zip(draft.rejected, contents, strict=True):
        if any(isinstance(part, Place) for part in content):
            raise UserError(
                f"{turn.where}: found an image in the rejected answer, wanted words; move it to the prompt"
            )
    return [_message(turn, content) for turn, content in zip(draft.rejected, contents, strict=True)]
