"""From a sample's images and videos to pixels, augmented at random, or to the tower's cached tokens.

`open_medium` is the one way to open them; `PixelLoader` and `CachedFeatureLoader` prepare them for a batch.

Shapes: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image as Picture
from torch import Tensor

from flamingo_ft.config import AugmentationSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import data_uri, shorten
from flamingo_ft.model import FlamingoProcessor, images
from flamingo_ft.model.download import download, is_url
from flamingo_ft.model.geometry import Size
from flamingo_ft.model.tiles import Tiling
from flamingo_ft.model.views import Views

from .augment import Augmentation
from .boxes import boxes_on, kept_in_view
from .feature_cache import Frame, Frames, lookup_frame
from .feature_store import FeatureStore
from .sample import Image, Medium, Sample, Video
from .video import even_positions, frame_positions, read_frames

PREVIEW_PIXELS = 128  # longer side
PREVIEW_PREFIX = "data:image/png;base64,"


def open_medium(medium: Medium, where: str | None = None, video_frames: int = 8) -> list[Picture]:
    """Return upright RGB images: one for an image, ``video_frames`` evenly spaced ones for a video.

    A video with fewer frames gives all of them.

    URLs are fetched: a `Sample` has only those that its recipe allows. Raises UserError, beginning with
    ``where``, for a file that cannot be read or fetched, and for a video file without PyAV.
    """
    if not isinstance(medium, Video):
        return [_decoded(_fetched(medium, where), medium, where)]
    if medium.file is not None:
        frames = read_frames(_fetched(medium.file, where), video_frames, display_name(medium.file, where))
        return list(frames.values())
    chosen = [medium.frames[i] for i in even_positions(len(medium.frames), video_frames)]
    return [_decoded(_fetched(frame, where), frame, where) for frame in chosen]


def open_image(path: str | Path, where: str | None = None) -> Picture:
    """Open a local image file as RGB, upright. Raises UserError naming the file if it cannot be read."""
    return _decoded(path, path, where)


def read_bytes(image: Image, where: str | None = None) -> bytes:
    """Return the content of an image or video file.

    Raises UserError, beginning with ``where``, if it cannot be read.
    """
    content = _fetched(image, where)
    if isinstance(content, bytes):
        return content
    try:
        return Path(content).read_bytes()
    except OSError as error:
        raise UserError(
            f"{display_name(image, where)}: cannot be read ({error.strerror}); replace it"
        ) from None


def decode_image(content: bytes, image: Image, where: str | None = None) -> Picture:
    """Decode the content of ``image``.

    Raises UserError, beginning with ``where``, for bytes that are not an image.
    """
    return _decoded(content, image, where)


def display_name(medium: str | Path | bytes, where: str | None) -> str:
    """Return what error messages call a file: the sample and its path, or the number of bytes."""
    name = f"{len(medium)} bytes" if isinstance(medium, bytes) else shorten(medium)
    return f"{where}: {name}" if where else name


def load_pixels(
    processor: FlamingoProcessor,
    medium: Medium,
    where: str,
    change: Callable[[list[Picture]], list[Picture]] | None = None,
) -> Views:
    """Return a medium as the tower takes it: an image's views, or a video's frames.

    Raises UserError, beginning with ``where``, if it cannot be read.

    Args:
        change: applied to the pictures before the tower's transform.
    """
    frames = open_medium(medium, where, processor.image_processor.video_frames)
    if change is not None:
        frames = change(frames)
    if isinstance(medium, Video):
        return Views(torch.stack([processor.image_processor.transform(frame) for frame in frames]))
    return processor.image_processor.views(frames[0])


@dataclass(frozen=True)
class PixelLoader:
    """Loads a sample's media as pixels, augmented at random if ``augmentation`` is set."""

    processor: FlamingoProcessor
    augmentation: AugmentationSection | None = None
    seed: int = 0

    def __call__(self, sample: Sample, kept: int, number: int) -> list[Views]:
        """Load the first ``kept`` media.

        number: the sample's index in the run; with ``seed``, it seeds augmentation.
        """
        return [
            load_pixels(self.processor, medium, sample.where, partial(self._augmented, sample, number, index))
            for index, medium in enumerate(sample.images[:kept])
        ]

    def augmentation_of(self, sample: Sample, number: int, index: int, size: Size) -> Augmentation | None:
        """Return how a sample's medium is augmented in this use; None if it is not.

        size: width and height of the medium. A crop that cuts off most of a box is left out.
        """
        if self.augmentation is None:
            return None
        drawn = Augmentation.draw(self.augmentation, hash((self.seed, number, index)))
        return kept_in_view(drawn, boxes_on(sample, index), size, self.processor.image_processor)

    def _augmented(self, sample: Sample, number: int, index: int, frames: list[Picture]) -> list[Picture]:
        augmentation = self.augmentation_of(sample, number, index, frames[0].size)
        return frames if augmentation is None else augmentation.apply(frames)


@dataclass(frozen=True)
class PictureLoader(PixelLoader):
    """Loads a sample's images as Pillow images, augmented at random if ``augmentation`` is set."""

    def __call__(self, sample: Sample, kept: int, number: int) -> list[Any]:
        """Load the first ``kept`` images."""
        pictures = []
        for index, medium in enumerate(sample.images[:kept]):
            pictures += self._augmented(sample, number, index, open_medium(medium, sample.where))
        return pictures


@dataclass(frozen=True)
class CachedFeatureLoader:
    """Looks a sample's media up in the feature cache; only frames that are not in it are decoded."""

    processor: FlamingoProcessor
    store: FeatureStore

    def __call__(self, sample: Sample, kept: int, number: int) -> list[Frames]:
        """Return each of the first ``kept`` media."""
        return [self._medium(medium, sample.where) for medium in sample.images[:kept]]

    def _medium(self, medium: Medium, where: str) -> Frames:
        if not isinstance(medium, Video):
            return self._image(medium, where)
        if medium.file is not None:
            return Frames(self._video_file(medium.file, where))
        positions = even_positions(len(medium.frames), self.processor.image_processor.video_frames)
        return Frames([self._frame(medium.frames[i], where) for i in positions])

    def _image(self, image: Image, where: str) -> Frames:
        tiling = self.processor.image_processor.tiling
        if tiling is None:
            return Frames([self._frame(image, where)])
        content = read_bytes(image, where)
        if cached := self._cached_views(content, tiling):
            return cached
        views = self.processor.image_processor.views(decode_image(content, image, where))
        keys = [self.store.key_of(content, name) for name in tiling.view_names(views.grid)]
        frames = [Frame(key, pixels=pixels) for key, pixels in zip(keys, views.values, strict=True)]
        return Frames(frames, views.grid)

    def _cached_views(self, content: bytes, tiling: Tiling) -> Frames | None:
        """Return an image's views if all are cached: of all grids, only its own can be."""
        for grid in tiling.grids:
            keys = [self.store.key_of(content, name) for name in tiling.view_names(grid)]
            tokens = [self.store.get(key) for key in keys] if self.store.path(keys[-1]).is_file() else [None]
            if all(view is not None for view in tokens):
                return Frames([Frame(key, view) for key, view in zip(keys, tokens, strict=True)], grid)
        return None

    def _frame(self, image: Image, where: str) -> Frame:
        content = read_bytes(image, where)
        return lookup_frame(self.store, content, lambda: self._pixels(decode_image(content, image, where)))

    def _video_file(self, file: Image, where: str) -> list[Frame]:
        content, name = read_bytes(file, where), display_name(file, where)
        positions = frame_positions(content, self.processor.image_processor.video_frames, name)
        keys = [self.store.key_of(content, position) for position in positions]
        tokens = [self.store.get(key) for key in keys]
        if keys and all(frame_tokens is not None for frame_tokens in tokens):
            return [Frame(key, frame_tokens) for key, frame_tokens in zip(keys, tokens, strict=True)]
        frames = read_frames(content, self.processor.image_processor.video_frames, name)
        return [
            lookup_frame(self.store, content, partial(self._pixels, frame), position)
            for position, frame in frames.items()
        ]

    def _pixels(self, picture: Picture) -> Tensor:
        return self.processor.image_processor.transform(picture)


def image_files(media: Iterable[Medium]) -> list[Image]:
    """Return every image file; for a video, its file or frames."""
    files: list[Image] = []
    for medium in media:
        if not isinstance(medium, Video):
            files.append(medium)
        elif medium.file is not None:
            files.append(medium.file)
        else:
            files += medium.frames
    return files


def preview(medium: Medium) -> str:
    """Return a medium as text to show it later: the path of a local image, else a data URI of a small PNG.

    For a video, it shows the first frame.
    """
    if isinstance(medium, str) and not is_url(medium):
        return medium
    picture = open_medium(medium)[0]
    picture.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def open_preview(text: str) -> Picture:
    """Open the picture of a `preview`. Raises UserError if its path is no longer a readable image."""
    if text.startswith(PREVIEW_PREFIX):
        return images.open_image(base64.b64decode(text.removeprefix(PREVIEW_PREFIX)))
    return open_image(text)


def _fetched(image: Image, where: str | None) -> Image:
    """Return a path, or the content of a URL."""
    return download(image, where or "image") if isinstance(image, str) and is_url(image) else image


def _decoded(content: str | Path | bytes, medium: str | Path | bytes, where: str | None) -> Picture:
    try:
        return images.open_image(content)
    except images.UnreadableImage as error:
        raise UserError(
            f"{display_name(medium, where)}: not a readable image ({error}); replace it"
        ) from None
