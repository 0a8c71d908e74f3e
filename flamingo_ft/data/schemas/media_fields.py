"""The fields in which rows keep their images and videos, named alike in all schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flamingo_ft.data.fields import Row, is_blank, list_field
from flamingo_ft.errors import UserError

from .draft import Given

MEDIA_FIELDS = ("image", "images", "video", "videos")


def images_of(row: Row, where: str) -> list[Given]:
    """``image``: one, or several in a list; or ``images``: a list."""
    return _media(row, "image", where, _one_or_more)


def videos_of(row: Row, where: str) -> list[Given]:
    """``video``: a file, or a list of frames; or ``videos``: a list of those."""
    return _media(row, "video", where, lambda value, place: [Given(value, place)])


def _media(row: Row, name: str, where: str, single: Callable[[Any, str], list[Given]]) -> list[Given]:
    several = f"{name}s"
    one = [] if _is_none(row.get(name)) else single(row[name], f"{where}: {name}")
    listed = [] if _is_none(row.get(several)) else list_field(row, several, where)
    listed = [] if _is_none(listed) else listed  # it may have been a list as JSON text
    if one and listed:
        raise UserError(
            f"{where}: found both {name} and {several}, wanted one of them; join them into {several}"
        )
    return one or [Given(value, f"{where}: {several}[{index}]") for index, value in enumerate(listed)]


def _one_or_more(value: Any, place: str) -> list[Given]:
    if isinstance(value, list):
        return [Given(one, f"{place}[{index}]") for index, one in enumerate(value)]
    return [Given(value, place)]


def _is_none(value: Any) -> bool:
    """Whether a field says that there is no image: nothing, an empty list, or a list of nothing. Nulls among images are
    not passed over: which image is missing would go unnoticed."""
    return is_blank(value) or (isinstance(value, list) and all(map(is_blank, value)))
