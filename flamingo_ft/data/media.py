"""The one way from a sample's images and videos to pixels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as PillowImage

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import shorten
from flamingo_ft.model import images
from flamingo_ft.model.download import download, is_url

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
        return list(
            read_frames(_content(medium.file, where), video_frames, name_in(medium.file, where)).values()
        )
    return [_open_image(medium.frames[i], where) for i in even_positions(len(medium.frames), video_frames)]


def open_image(path: str | Path, where: str | None = None) -> PillowImage.Image:
    """A local image file as RGB, upright. UserError naming the file when it cannot be read."""
    return _decoded(path, path, where)


def read_content(image: Image, where: str | None = None) -> bytes:
    """The bytes of an image or video file. UserError, beginning with ``where``, for one that cannot be read."""
    content = _content(image, where)
    if isinstance(content, bytes):
        return content
    try:
        return Path(content).read_bytes()
    except OSError as error:
        raise UserError(f"{name_in(image, where)}: cannot be read ({error.strerror}); replace it") from None


def open_content(content: bytes, image: Image, where: str | None = None) -> PillowImage.Image:
    """The picture in the bytes of ``image``. UserError, beginning with ``where``, for bytes that are none."""
    return _decoded(content, image, where)


def _open_image(image: Image, where: str | None) -> PillowImage.Image:
    return _decoded(_content(image, where), image, where)


def _content(image: Image, where: str | None) -> Image:
    """A path, or a file's content."""
    return download(image, where or "image") if isinstance(image, str) and is_url(image) else image


def _decoded(content: str | Path | bytes, medium: str | Path | bytes, where: str | None) -> PillowImage.Image:
    try:
        return images.open_image(content)
    except images.UnreadableImage as error:
        raise UserError(f"{name_in(medium, where)}: not a readable image ({error}); replace it") from None


def name_in(medium: str | Path | bytes, where: str | None) -> str:
    """What errors call a file: the sample and its path; bytes alone have no name."""
    name = f"{len(medium)} bytes" if isinstance(medium, bytes) else shorten(medium)
    return f"{where}: {name}" if where else name
