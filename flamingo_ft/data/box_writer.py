"""From the boxes of a sample to their text, once it is known how the model sees the images they are on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from flamingo_ft.errors import UserError
from flamingo_ft.model import images
from flamingo_ft.model.download import is_url
from flamingo_ft.model.geometry import ImageGeometry, Size
from flamingo_ft.model.processor import FlamingoImageProcessor

from .boxes import view_text
from .media import PixelLoader, display_name, read_bytes
from .sample import Box, Image, Medium, Sample, Video, with_box_texts

REMEMBERED_SIZES = 4096  # of image files


@dataclass(frozen=True)
class BoxWriter:
    """Writes the boxes of samples as text; a sample without boxes stays as it is.

    image_processor: decides what the model sees. loader: augments the images in training.
    """

    image_processor: FlamingoImageProcessor
    loader: PixelLoader | None = None

    def __call__(self, sample: Sample, number: int = 0) -> Sample:
        """Return the sample with its boxes as text and the geometries of its images.

        number: the sample's index in the run, which seeds augmentation. Raises UserError for a box that is
        not on its image or that the model does not see at all, and for an image that cannot be read.
        """
        if not sample.boxes or sample.geometries:
            return sample
        media = [self._fetched(sample, index) for index in range(len(sample.images))]
        sample = replace(sample, images=media)
        geometries = tuple(self._geometry(sample, number, index) for index in range(len(media)))
        texts = [_text(box, geometries[box.image]) for box in sample.boxes]
        rejected = None if sample.rejected is None else with_box_texts(sample.rejected, texts)
        messages = with_box_texts(sample.messages, texts)
        return replace(sample, messages=messages, rejected=rejected, geometries=geometries)

    def _fetched(self, sample: Sample, index: int) -> Medium:
        """Return a medium; an image with boxes at a URL is fetched, once for its size and its pixels."""
        medium = sample.images[index]
        is_remote = isinstance(medium, str) and is_url(medium)
        return read_bytes(medium, sample.where) if is_remote and _has_boxes(sample, index) else medium

    def _geometry(self, sample: Sample, number: int, index: int) -> ImageGeometry | None:
        """Return how the model sees an image; None for one without boxes."""
        medium = sample.images[index]
        if not _has_boxes(sample, index) or isinstance(medium, Video):
            return None
        size = image_size(medium, sample.where)
        augmentation = self.loader and self.loader.augmentation_of(sample, number, index, size)
        picture = ImageGeometry.of(*size)
        return self.image_processor.geometry(augmentation.geometry(picture) if augmentation else picture)


def image_size(image: Image, where: str | None = None) -> Size:
    """Return width and height of an upright image. Raises UserError, beginning with ``where``."""
    if isinstance(image, str) and is_url(image):
        image = read_bytes(image, where)
    try:
        if isinstance(image, bytes):
            return images.upright_size(image)
        status = Path(image).stat()
        return _size_of_file(image, status.st_mtime_ns, status.st_size)
    except images.UnreadableImage as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or "cannot be opened"
    raise UserError(f"{display_name(image, where)}: not a readable image ({problem}); replace it")


@lru_cache(REMEMBERED_SIZES)
def _size_of_file(path: str | os.PathLike[str], changed: int, length: int) -> Size:
    """Return the size of an image file. changed, length: so that a new file of the same name is read."""
    return images.upright_size(path)


def _text(box: Box, geometry: ImageGeometry | None) -> str:
    assert geometry is not None  # its image has a box
    return view_text(box, geometry)


def _has_boxes(sample: Sample, index: int) -> bool:
    return any(box.image == index for box in sample.boxes)
