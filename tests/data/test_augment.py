"""Augmentation depends on the seed alone, and stays within the limits of the recipe."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flamingo_ft.config import AugmentationSection
from flamingo_ft.data.augment import Augmentation

ALL = AugmentationSection(crop=0.5, flip=0.5, color=0.4)


def coordinates(width: int = 200, height: int = 100) -> Image.Image:
    """Return an image whose red channel is the column and whose green channel is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def augment(frames: list[Image.Image], section: AugmentationSection, seed: int) -> list[Image.Image]:
    return Augmentation.draw(section, seed).apply(frames)


def augmented(seed: int) -> bytes:
    return augment([coordinates()], ALL, seed)[0].tobytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63), st.floats(0.05, 1))
def test_a_crop_is_a_rectangle_of_at_least_the_requested_area(seed, share):
    (result,) = augment([coordinates()], AugmentationSection(crop=share), seed)
    pixels = np.asarray(result)
    left, top = pixels[0, 0, :2]
    whole = np.asarray(coordinates())
    assert np.array_equal(pixels, whole[top : top + result.height, left : left + result.width])
    assert result.width * result.height >= share * 200 * 100 - 200  # sides are rounded to pixels


def test_an_empty_section_changes_nothing():
    (result,) = augment([coordinates()], AugmentationSection(), 5)
    assert np.array_equal(np.asarray(result), np.asarray(coordinates()))


@pytest.mark.parametrize("chance", [0.0, 0.3, 1.0])
def test_flips_are_as_frequent_as_requested(chance):
    section = AugmentationSection(flip=chance)
    flips = [augment([coordinates(2, 1)], section, seed)[0].getpixel((0, 0))[0] for seed in range(300)]
    assert abs(np.mean(flips) - chance) < 0.1 and (chance not in (0, 1) or np.mean(flips) == chance)


def test_colors_stay_within_the_requested_range():
    gray = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [
        augment([gray], AugmentationSection(color=0.2), seed)[0].getpixel((0, 0)) for seed in range(200)
    ]
    assert all(79 <= value <= 121 for pixel in values for value in pixel)
    assert min(map(min, values)) < 85 and max(map(max, values)) > 115


def test_images_depend_only_on_the_seed_in_any_process():
    here = [augmented(seed) for seed in range(8)]
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(augmented, range(8))) == here
    assert len(set(here)) == 8


def test_frames_of_a_video_are_augmented_alike_whatever_their_size():
    first, second, small = augment([coordinates(), coordinates(), coordinates(100, 50)], ALL, 3)
    assert first.tobytes() == second.tobytes()
    assert abs(small.width - first.width / 2) <= 1 and abs(small.height - first.height / 2) <= 1
