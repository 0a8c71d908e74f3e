"""A geometry says where a rectangle is after augmentation and after the tower's transform, and in tiles."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flamingo_ft.backbones.tower import to_picture
from flamingo_ft.config import AugmentationSection
from flamingo_ft.data.augment import Augmentation
from flamingo_ft.model import FlamingoImageProcessor, images
from flamingo_ft.model.boxes import box_text, parse_boxes
from flamingo_ft.model.geometry import ImageGeometry, clip

SIZES = (48, [48, 48], [40, 64])
MODES = ("shortest", "longest", "squash")


def processor(size=48, mode: str = "shortest", tiles: dict | None = None) -> FlamingoImageProcessor:
    fields = {"size": size, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "fill_color": 0}
    return FlamingoImageProcessor(fields | {"interpolation": "bicubic", "resize_mode": mode}, tiles=tiles)


def with_rectangle(width: int, height: int, box: tuple[int, ...]) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def bright_part(pixels: np.ndarray) -> tuple[float, ...]:
    """The rectangle that is brighter than half, as fractions of the picture; by area, so below a pixel."""
    level = pixels[..., 0].astype(float) / 255
    rows, columns = level.max(axis=1), level.max(axis=0)
    (top, bottom), (left, right) = map(edges, (rows, columns))
    return left / level.shape[1], top / level.shape[0], right / level.shape[1], bottom / level.shape[0]


def edges(profile: np.ndarray) -> tuple[float, float]:
    inside = np.flatnonzero(profile > 0.5)
    return float(inside[0]), float(inside[-1] + 1)


def assert_near(box, other, pixels: float, size) -> None:
    for ours, theirs, side in zip(box, other, size * 2, strict=True):
        assert abs(ours - theirs) * side <= pixels, (box, other)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(50, 140), st.integers(50, 140)),
    st.sampled_from(SIZES),
    st.sampled_from(MODES),
    st.data(),
)
def test_the_transform_moves_a_rectangle_to_where_the_geometry_says(size, tower, mode, data):
    width, height = size
    left, top = (
        data.draw(st.integers(width // 4, width // 2)),
        data.draw(st.integers(height // 4, height // 2)),
    )
    box = left, top, left + width // 4, top + height // 4
    images = processor(tower, mode)
    pixels = to_picture(images.open_clip_preprocess, images.transform(with_rectangle(*size, box))).numpy()
    geometry = images.geometry(ImageGeometry.of(*size))
    if geometry.visible_area(box) > 20 * 20:
        assert_near(bright_part(pixels), geometry.to_view(box), 1.1, images.input_size[::-1])


@pytest.mark.parametrize("tiles", [None, {"max_tiles": 4}], ids=["", "tiles"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tower", [48, [40, 64]], ids=str)
@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)], ids=str)
def test_a_thin_image_is_seen_with_its_boxes(size, tower, mode, tiles):
    images = processor(tower, mode, tiles)
    views = images.views(with_rectangle(*size, (0, 0, *size))).values
    assert views.shape[2:] == images.input_size
    assert to_picture(images.open_clip_preprocess, views).max() == 255
    width, height = size
    box = 0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height
    geometry = images.geometry(ImageGeometry.of(*size))
    assert geometry.to_original(geometry.to_view(box)) == pytest.approx(clip(box, geometry.visible))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.booleans())
def test_augmentation_moves_a_rectangle_to_where_its_geometry_says(seed, flips):
    box, size = (40, 30, 90, 60), (160, 120)
    drawn = Augmentation.draw(AugmentationSection(crop=0.5, flip=float(flips), color=0.1), seed)
    (picture,) = drawn.apply([with_rectangle(*size, box)])
    geometry = drawn.geometry(ImageGeometry.of(*size))
    assert geometry.picture_size == picture.size
    if geometry.visible_area(box) > 0:
        seen = geometry.to_view(box)
        assert bright_part(np.asarray(picture)) == pytest.approx(seen, abs=1e-9)  # no pixel is interpolated


def test_tiles_together_show_a_rectangle_where_the_geometry_says():
    box, size = (20, 60, 70, 110), (150, 130)
    images = processor(tiles={"max_tiles": 6, "thumbnail": False})
    views = images.views(with_rectangle(*size, box))
    rows, columns = views.grid
    assert rows * columns > 1
    tiles = to_picture(images.open_clip_preprocess, views.values).unflatten(0, (rows, columns))
    canvas = torch.cat([torch.cat([*row], dim=1) for row in tiles]).numpy()
    seen = images.geometry(ImageGeometry.of(*size)).to_view(box)
    assert seen == pytest.approx((20 / 150, 60 / 130, 70 / 150, 110 / 130))
    assert_near(bright_part(canvas), seen, 1.1, canvas.shape[1::-1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(30, 3000),
    st.integers(30, 3000),
    st.sampled_from(SIZES),
    st.sampled_from(MODES),
    st.integers(0),
)
def test_what_is_seen_maps_back_to_the_same_pixels(width, height, tower, mode, seed):
    drawn = Augmentation.draw(AugmentationSection(crop=0.3, flip=0.5), seed)
    geometry = processor(tower, mode).geometry(drawn.geometry(ImageGeometry.of(width, height)))
    box = 0.45 * width, 0.45 * height, 0.55 * width, 0.55 * height
    seen = geometry.to_view(box)
    assert seen[0] <= seen[2] and seen[1] <= seen[3]
    assert min(seen) >= 0 and max(seen) <= 1
    left, top, right, bottom = geometry.visible
    part = max(box[0], left), max(box[1], top), min(box[2], right), min(box[3], bottom)
    if geometry.visible_area(box) > 0:
        assert geometry.to_original(seen) == pytest.approx(part)


@pytest.mark.parametrize("text, boxes", [
    ("[120, 300, 400, 560]", [(0.12, 0.3, 0.4, 0.56)]),
    ("a dog [0,0,1000,1000] and [10, 20,30,40].", [(0, 0, 1, 1), (0.01, 0.02, 0.03, 0.04)]),
    ("[400, 300, 120, 560] [0, 0, 1, 1001] [5, 5, 5, 9]", [None, None, None]),
    ("[1, 2, 3] [1, 2, 3, 4, 5] [a] [-1, 0, 2, 3] [0.1, 0.2, 0.3, 0.4]", []),
])  # fmt: skip
def test_boxes_in_a_text(text, boxes):
    assert parse_boxes(text) == boxes


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_every_written_box_can_be_read(sides):
    (left, right), (top, bottom) = sorted(sides[:2]), sorted(sides[2:])
    (box,) = parse_boxes(box_text((left, top, right, bottom)))
    assert box == pytest.approx((left, top, right, bottom), abs=0.0016)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_an_image_is_that_of_the_upright_picture(file_format, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(file, file_format, exif=exif)
    content = file.getvalue()
    assert images.upright_size(content) == images.open_image(content).size


def test_the_size_of_a_jpeg_is_read_without_its_pixels():
    file = io.BytesIO()
    Image.effect_noise((400, 300), 50).save(file, "JPEG")
    assert images.upright_size(file.getvalue()[:2000]) == (400, 300)
    with pytest.raises(images.UnreadableImage):
        images.upright_size(b"no image")
