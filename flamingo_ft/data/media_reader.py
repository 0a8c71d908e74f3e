"""From a sample's media to what a batch takes of them: pixels, or the tower's tokens where they are kept on disk.

Shapes: F frames, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image as PillowImage
from torch import Tensor

from flamingo_ft.config import AugmentationSection
from flamingo_ft.model import FlamingoProcessor

from .augment import augment
from .features import FeatureStore, Frame, find_frame
from .media import name_in, open_content, open_medium, read_content
from .sample import Image, Medium, Sample, Video
from .video import even_positions, frame_positions, read_frames


@dataclass(frozen=True)
class PixelReader:
    """A sample's first ``kept`` media as pixels (F, C, H, W) each, changed at random where ``augmentation`` says how.

    number: of the draw, which seeds the changes together with ``seed``.
    """

    processor: FlamingoProcessor
    video_frames: int
    augmentation: AugmentationSection | None = None
    seed: int = 0

    def __call__(self, sample: Sample, kept: int, number: int) -> list[Tensor]:
        return [self._read(medium, sample.where, number, place) for place, medium in enumerate(sample.images[:kept])]

    def _read(self, medium: Medium, where: str, number: int, place: int) -> Tensor:
        frames = open_medium(medium, where, self.video_frames)
        if self.augmentation is not None:
            frames = augment(frames, self.augmentation, hash((self.seed, number, place)))
        return torch.stack([self.processor.image_processor.transform(frame) for frame in frames])


@dataclass(frozen=True)
class StoredReader:
    """The same, of frames whose tokens may be in ``store``: those are taken from there, and no image is decoded."""

    processor: FlamingoProcessor
    video_frames: int
    store: FeatureStore

    def __call__(self, sample: Sample, kept: int, number: int) -> list[list[Frame]]:
        return [self._find(medium, sample.where) for medium in sample.images[:kept]]

    def _find(self, medium: Medium, where: str) -> list[Frame]:
        if not isinstance(medium, Video):
            return [self._find_image(medium, where)]
        if medium.file is not None:
            return self._find_frames(medium.file, where)
        positions = even_positions(len(medium.frames), self.video_frames)
        return [self._find_image(medium.frames[i], where) for i in positions]

    def _find_image(self, image: Image, where: str) -> Frame:
        content = read_content(image, where)
        return find_frame(self.store, content, lambda: self._pixels(open_content(content, image, where)))

    def _find_frames(self, file: Image, where: str) -> list[Frame]:
        content, name = read_content(file, where), name_in(file, where)
        keys = [self.store.key_of(content, position) for position in frame_positions(content, self.video_frames, name)]
        tokens = [self.store.get(key) for key in keys]
        if keys and all(own is not None for own in tokens):
            return [Frame(key, own) for key, own in zip(keys, tokens, strict=True)]
        frames = read_frames(content, self.video_frames, name)
        find = partial(find_frame, self.store, content)
        return [find(partial(self._pixels, frame), position) for position, frame in frames.items()]

    def _pixels(self, picture: PillowImage.Image) -> Tensor:
        return self.processor.image_processor.transform(picture)
