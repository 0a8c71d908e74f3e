"""From a sample's media to what a batch takes of them: pixels, or the tower's tokens where they are kept on disk.

Shapes: F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL.Image import Image as Picture
from torch import Tensor

from flamingo_ft.config import AugmentationSection
from flamingo_ft.model import FlamingoProcessor

from .augment import augment
from .features import FeatureStore, Frame, find_frame
from .media import name_in, open_content, open_medium, read_content
from .sample import Image, Medium, Sample, Video
from .video import even_positions, frame_positions, read_frames


def read_pixels(
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
class PixelReader:
    """A sample's first ``kept`` media as pixels (F, C, H, W) each, changed at random where ``augmentation`` says how.

    number: of the draw, which seeds the changes together with ``seed``.
    """

    processor: FlamingoProcessor
    augmentation: AugmentationSection | None = None
    seed: int = 0

    def __call__(self, sample: Sample, kept: int, number: int) -> list[Tensor]:
        return [
            read_pixels(self.processor, medium, sample.where, self._change(number, place))
            for place, medium in enumerate(sample.images[:kept])
        ]

    def _change(self, number: int, place: int) -> Callable[[list[Picture]], list[Picture]] | None:
        if self.augmentation is None:
            return None
        return partial(augment, wanted=self.augmentation, seed=hash((self.seed, number, place)))


@dataclass(frozen=True)
class StoredReader:
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
        content = read_content(image, where)
        return find_frame(self.store, content, lambda: self._pixels(open_content(content, image, where)))

    def _find_frames(self, file: Image, where: str) -> list[Frame]:
        content, name = read_content(file, where), name_in(file, where)
        keys = [
            self.store.key_of(content, position)
            for position in frame_positions(content, self.processor.image_processor.video_frames, name)
        ]
        tokens = [self.store.get(key) for key in keys]
        if keys and all(own is not None for own in tokens):
            return [Frame(key, own) for key, own in zip(keys, tokens, strict=True)]
        frames = read_frames(content, self.processor.image_processor.video_frames, name)
        find = partial(find_frame, self.store, content)
        return [find(partial(self._pixels, frame), position) for position, frame in frames.items()]

    def _pixels(self, picture: Picture) -> Tensor:
        return self.processor.image_processor.transform(picture)
