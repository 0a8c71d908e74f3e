"""The one way from a sample's images and videos to pixels.

From a sample's media to what a batch takes of them: pixels, or the tower's tokens where they are kept on disk.

Shapes: F frames, C channels, H height, W width.


A medium as a line of JSON can hold it, to be shown later: its path, or a small picture of what has none.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image as PillowImage
from PIL.Image import Image as Picture
from torch import Tensor

from flamingo_ft.config import AugmentationSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import data_uri, shorten
from flamingo_ft.model import FlamingoProcessor, images
from flamingo_ft.model.download import download, is_url

from .augment import augment
from .features import FeatureStore, Frame, lookup_frame
from .sample import Image, Medium, Sample, Video
from .video import even_positions, frame_positions, read_frames


def open_medium(medium: Medium, where: str | None = None, video_frames: int = 8) -> list[PillowImage.Image]:
    """RGB upright images: one for an image, ``video_frames`` evenly spaced ones for a video, or all of a shorter one.

    medium: as a `Sample` has it, so a URL is one that its recipe allowed. Raises UserError, beginning with ``where``,
    for a file that cannot be read or fetched, and for a video file without PyAV.
    """
    if not isinstance(medium, Video):
        return [_open_image(medium, where)]
    if medium.file is not None:
        return list(
            read_frames(_content(medium.file, where), video_frames, display_name(medium.file, where)).values()
        )
    return [_open_image(medium.frames[i], where) for i in even_positions(len(medium.frames), video_frames)]


def open_image(path: str | Path, where: str | None = None) -> PillowImage.Image:
    """A local image file as RGB, upright. UserError naming the file when it cannot be read."""
    return _decoded(path, path, where)


def read_bytes(image: Image, where: str | None = None) -> bytes:
    """The bytes of an image or video file. UserError, beginning with ``where``, for one that cannot be read."""
    content = _content(image, where)
    if isinstance(content, bytes):
        return content
    try:
        return Path(content).read_bytes()
    except OSError as error:
        raise UserError(
            f"{display_name(image, where)}: cannot be read ({error.strerror}); replace it"
        ) from None


def decode_image(content: bytes, image: Image, where: str | None = None) -> PillowImage.Image:
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
        raise UserError(
            f"{display_name(medium, where)}: not a readable image ({error}); replace it"
        ) from None


def display_name(medium: str | Path | bytes, where: str | None) -> str:
    """What errors call a file: the sample and its path; bytes alone have no name."""
    name = f"{len(medium)} bytes" if isinstance(medium, bytes) else shorten(medium)
    return f"{where}: {name}" if where else name


def load_pixels(
    processor: FlamingoProcessor,
    medium: Medium,
    where: str,
    change: Callable[[list[Picture]], list[Picture]] | None = None,
) -> Tensor:
    """A medium's frames as the tower takes them, (F, C, H, W); ``change`` is made to the pictures before that.

    Raises UserError, beginning with ``where``, for one that cannot be read.
    """
    frames = open_medium(medium, where, processor.image_processor.video_frames)
    return torch.stack(
        [processor.image_processor.transform(frame) for frame in (change(frames) if change else frames)]
    )


@dataclass(frozen=True)
class PixelLoader:
    """A sample's first ``kept`` media as pixels (F, C, H, W) each, changed at random where ``augmentation`` says how.

    number: of the draw, which seeds the changes together with ``seed``.
    """

    processor: FlamingoProcessor
    augmentation: AugmentationSection | None = None
    seed: int = 0

    def __call__(self, sample: Sample, kept: int, number: int) -> list[Tensor]:
        return [
            load_pixels(self.processor, medium, sample.where, self._change(number, place))
            for place, medium in enumerate(sample.images[:kept])
        ]

    def _change(self, number: int, place: int) -> Callable[[list[Picture]], list[Picture]] | None:
        if self.augmentation is None:
            return None
        return partial(augment, wanted=self.augmentation, seed=hash((self.seed, number, place)))


@dataclass(frozen=True)
class CachedFeatureLoader:
    """The same, of frames whose tokens may be in ``store``: those are taken from there, and no image is decoded."""

    processor: FlamingoProcessor
    store: FeatureStore

    def __call__(self, sample: Sample, kept: int, number: int) -> list[list[Frame]]:
        return [self._find(medium, sample.where) for medium in sample.images[:kept]]

    def _find(self, medium: Medium, where: str) -> list[Frame]:
        if not isinstance(medium, Video):
            return [self._find_image(medium, where)]
        if medium.file is not None:
            return self._find_frames(medium.file, where)
        positions = even_positions(len(medium.frames), self.processor.image_processor.video_frames)
        return [self._find_image(medium.frames[i], where) for i in positions]

    def _find_image(self, image: Image, where: str) -> Frame:
        content = read_bytes(image, where)
        return lookup_frame(self.store, content, lambda: self._pixels(decode_image(content, image, where)))

    def _find_frames(self, file: Image, where: str) -> list[Frame]:
        content, name = read_bytes(file, where), display_name(file, where)
        keys = [
            self.store.key_of(content, position)
            for position in frame_positions(content, self.processor.image_processor.video_frames, name)
        ]
        tokens = [self.store.get(key) for key in keys]
        if keys and all(own is not None for own in tokens):
            return [Frame(key, own) for key, own in zip(keys, tokens, strict=True)]
        frames = read_frames(content, self.processor.image_processor.video_frames, name)
        find = partial(lookup_frame, self.store, content)
        return [find(partial(self._pixels, frame), position) for position, frame in frames.items()]

    def _pixels(self, picture: Picture) -> Tensor:
        return self.processor.image_processor.transform(picture)


SIDE = 128  # pixels
DATA_URI = "data:image/png;base64,"


def preview(medium: Medium) -> str:
    """The path of a local image; else a data URI with a small PNG, of a video its first frame."""
    if isinstance(medium, str) and not is_url(medium):
        return medium
    picture = open_medium(medium)[0]
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def open_preview(text: str) -> PillowImage.Image:
    """The picture of a `preview`. UserError for a path that is no longer a readable image."""
    if text.startswith(DATA_URI):
        return images.open_image(base64.b64decode(text.removeprefix(DATA_URI)))
    return open_image(text)
