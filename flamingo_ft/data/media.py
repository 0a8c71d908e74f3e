"""The one way from a sample's images and videos to pixels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as PillowImage

from flamingo_ft.errors import UserError

from .download import download, is_url
from .locate import shortened
from .pixels import UnreadableImage, decode
from .sample import Image, Medium, Video
from .video import even_positions, read_frames


def open_medium(medium: Medium, where: str | None = None, video_frames: int = 8) -> list[PillowImage.Image]:
    """RGB upright images: one for an image, ``video_frames`` evenly spaced ones for a video, or all of a shorter one.

    medium: as a `Sample` has it, so a URL is one that its recipe allowed. Raises UserError, beginning with ``where``,
    for a file that cannot be read or fetched, and for a video file without PyAV.
    """
    if not isinstance(medium, Video):
        return [_open_image(medium, where)]
    if medium.file is not None:
        return read_frames(_content(medium.file, where), video_frames, _named(medium.file, where))
    return [_open_image(medium.frames[i], where) for i in even_positions(len(medium.frames), video_frames)]


def open_image(path: str | Path, where: str | None = None) -> PillowImage.Image:
    """A local image file as RGB, upright. UserError naming the file when it cannot be read."""
    return _decoded(path, path, where)


def _open_image(image: Image, where: str | None) -> PillowImage.Image:
    return _decoded(_content(image, where), image, where)


def _content(image: Image, where: str | None) -> Image:
    """A path, or a file's content."""
    return download(image, where or "image") if isinstance(image, str) and is_url(image) else image


def _decoded(content: str | Path | bytes, medium: str | Path | bytes, where: str | None) -> PillowImage.Image:
    try:
        return decode(content)
    except UnreadableImage as error:
        raise UserError(f"{_named(medium, where)}: not a readable image ({error}); replace it") from None


def _named(medium: str | Path | bytes, where: str | None) -> str:
    """The sample and the file, whose bytes alone have no name."""
    name = f"{len(medium)} bytes" if isinstance(medium, bytes) else shortened(medium)
    return f"{where}: {name}" if where else name
