"""Choose a feature cache for recipes without ``data.cache``, where it pays.

Only where it rounds nothing: the cache holds bf16, in which the tower of such a run computes anyway. Nothing
of the choice depends on the state of the machine, so that a resumed run makes the same one.
"""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from flamingo_ft.backbones.precision import autocast_dtype
from flamingo_ft.backbones.visual_tokens import image_shape, spatial_tokens
from flamingo_ft.config import CacheSection, Recipe
from flamingo_ft.config.tables import VISION
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.feature_cache import BATCH_SIZE
from flamingo_ft.data.feature_store import cache_folder
from flamingo_ft.data.opened_data import samples_per_epoch, steps_per_epoch
from flamingo_ft.data.sample import Video
from flamingo_ft.formatting import GIB, gib
from flamingo_ft.model import FlamingoForConditionalGeneration

MIN_PARAMETERS = 5_000_000  # of a tower; a smaller one encodes an image about as fast as its tokens are read
MIN_EPOCHS = 2.0
MAX_GIB = 20.0
ROWS = 64  # of the training data, from whose images those of all rows are estimated


@dataclass(frozen=True)
class AutomaticCache:
    """A cache that was chosen, for how many epochs, and about how large its folder will get, in bytes."""

    section: CacheSection
    epochs: float
    size: float

    def note(self) -> str:
        """Return a line for the user."""
        place = f"in {self.section.folder} (about {gib(self.size)} GiB)"
        return (
            f"data.auto_cache: the tower's tokens are kept {place}, so that {self.epochs:.3g} epochs encode "
            "each image once; data.auto_cache=false switches it off"
        )


def automatic_cache(
    model: FlamingoForConditionalGeneration, data: OpenedData, recipe: Recipe
) -> AutomaticCache | None:
    """Return the cache that a run without ``data.cache`` should have; None if it would not pay or fit.

    It pays from two epochs on; with batches of fewer images than the tower then takes at once, from three.
    """
    if not recipe.data.auto_cache or not _can_cache(model.vision_encoder, recipe):
        return None
    per_epoch, samples = steps_per_epoch(recipe, data), samples_per_epoch(recipe, data)
    steps = recipe.train.max_steps
    if per_epoch is None or samples is None or steps is None:  # streamed
        return None
    images = _images_per_sample(data, recipe)
    epochs = steps / float(per_epoch)
    is_small = recipe.train.samples_per_batch * images < BATCH_SIZE
    size = samples * images * _token_bytes(model.vision_encoder)
    if epochs < MIN_EPOCHS + is_small or size > MAX_GIB * GIB or not images:
        return None
    folder = cache_folder("tokens")
    return AutomaticCache(CacheSection(folder=folder, max_gib=_room(folder)), epochs, size)


def _can_cache(tower: nn.Module, recipe: Recipe) -> bool:
    parameters = [*tower.parameters()]
    floating = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    return (
        recipe.data.cache is None
        and recipe.data.augmentation is None
        and VISION.name not in recipe.lora.parts
        and recipe.train.method != "grpo"
        and not recipe.train.fsdp
        and recipe.model.vision.quantization != "int8"  # its tokens depend on the batch
        and autocast_dtype(recipe.train.precision) == torch.bfloat16
        and floating == {torch.bfloat16}
        and sum(parameter.numel() for parameter in parameters) >= MIN_PARAMETERS
    )


def _images_per_sample(data: OpenedData, recipe: Recipe) -> float:
    """Return the mean number of images, views and frames of a sample, among the first rows."""
    rows = [*itertools.islice(data.samples(data.train), ROWS)]
    return sum(_images(sample, recipe) for sample in rows) / max(1, len(rows))


def _images(sample: Sample, recipe: Recipe) -> int:
    views = 1 if recipe.data.tiles is None else recipe.data.tiles.max + 1
    return sum(recipe.data.video_frames if isinstance(medium, Video) else views for medium in sample.images)


@torch.no_grad()
def _token_bytes(tower: nn.Module) -> int:
    device = next(tower.parameters()).device
    tokens = spatial_tokens(tower, torch.zeros(1, 3, *image_shape(tower), device=device))
    return prod(tokens.shape) * tokens.element_size()


def _room(folder: Path) -> float:
    """Return the GiB that the folder may fill: half of what is free. Images beyond are encoded every time."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return max(0.001, min(MAX_GIB, shutil.disk_usage(os.fspath(existing)).free / 2 / GIB))
