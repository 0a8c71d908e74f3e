"""The feature cache: the frozen tower's tokens of every image, computed once and stored on disk.

Workers look images up (`lookup_frame`) and send the tokens that are stored and the pixels of other images
(`collate_frames`); the training process encodes and stores what is missing (`FeatureCache.complete`).

Shapes: B samples, M media, F frames, S stored frames, P frames to encode, N images, C channels, H height, W
width, V visual tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flamingo_ft import atomic
from flamingo_ft.backbones.precision import DTYPES
from flamingo_ft.backbones.quantization import quantization_formats
from flamingo_ft.backbones.visual_tokens import image_shape, spatial_tokens
from flamingo_ft.config import CacheSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import GIB
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.tiles import UNTILED, Grid
from flamingo_ft.model.views import stack_grids

from .feature_store import FeatureStore, FeatureWriter, features_key, folder_name

BATCH_SIZE = 8  # images
# Keys of a batch whose images are partly cached.
FRAME_INDEX, FOUND, FRESH, FRESH_KEYS = "frame_index", "found_tokens", "fresh_pixels", "fresh_keys"
PENDING = (FRAME_INDEX, FOUND, FRESH, FRESH_KEYS)


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, a view of a tiled one, or a frame of a video.

    Its tokens (V, D) if they are cached, else its pixels (C, H, W). key: its cache key.
    """

    key: str
    tokens: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Frames:
    """A medium whose frames or views may be cached; grid: see `Views`."""

    frames: list[Frame]
    grid: Grid = UNTILED


def lookup_frame(
    store: FeatureStore, content: bytes, pixels: Callable[[], Tensor], number: int | None = None
) -> Frame:
    """Look up an image file by its content; for a video, its frame ``number``, counted in the whole video.

    Args:
        pixels: decodes and transforms the image to (C, H, W); called only if its tokens are not cached.
    """
    key = store.key_of(content, number)
    tokens = store.get(key)
    return Frame(key, pixels=pixels()) if tokens is None else Frame(key, tokens)


def collate_frames(rows: Sequence[Sequence[Frames]]) -> dict[str, Any]:
    """Collate the frames of each medium of each sample for `FeatureCache.complete`; {} without media.

    Returns found_tokens (S, V, D), fresh_pixels (P, C, H, W) and their fresh_keys, each image once;
    frame_index (B, M, F) into found and fresh frames together, -1 for padding; frame_counts (B, M); and
    tile_grids (B, M, 2) if images are tiled.
    """
    frames = [frame for row in rows for medium in row for frame in medium.frames]
    if not frames:
        return {}
    found = {frame.key: frame.tokens for frame in frames if frame.tokens is not None}
    fresh: dict[str, Any] = {frame.key: frame.pixels for frame in frames if frame.key not in found}
    numbers = {key: number for number, key in enumerate([*found, *fresh])}
    index, counts = _padded(
        [[[numbers[frame.key] for frame in medium.frames] for medium in row] for row in rows]
    )
    batch: dict[str, Any] = {FRAME_INDEX: index, "frame_counts": counts, **stack_grids(rows)}
    if found:
        batch[FOUND] = torch.stack(list(found.values()))
    if fresh:
        batch[FRESH], batch[FRESH_KEYS] = torch.stack(list(fresh.values())), list(fresh)
    return batch


class FrozenTower:
    """A tower that always runs on batches of one size, so that an image's tokens do not depend on its batch.

    Attributes:
        batch_size: fixed; smaller batches are zero-padded. 1 if outputs are not batch-invariant: in int8, an
            outlier in one image moves that column to higher precision for the whole batch.
        autocast: dtype that the trainer computes in; None without autocast.
    """

    def __init__(self, visual: nn.Module, dtype: torch.dtype, autocast: torch.dtype | None = None):
        if any(".lora_" in name for name, _ in visual.named_parameters()):
            raise UserError(
                "data.cache: LoRA changes the tower, so its tokens cannot be cached; set one of them to null"
            )
        self.visual, self.dtype, self.autocast = visual, dtype, autocast
        self.device = next(visual.parameters()).device
        trial = torch.randn(BATCH_SIZE, 3, *image_shape(visual), generator=torch.Generator().manual_seed(0))
        self.batch_size = (
            BATCH_SIZE
            if "int8" not in quantization_formats(visual) and self._is_batch_invariant(trial)
            else 1
        )
        self.shape = cast(tuple[int, int], tuple(self.encode(trial[:1]).shape[1:]))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens (N, V, D) of images (N, C, H, W), in the cache's dtype."""
        tokens = [self._encode_batch(batch, self.batch_size) for batch in images.split(self.batch_size)]
        return torch.cat(tokens).to(self.dtype)

    def _encode_batch(self, images: Tensor, batch_size: int) -> Tensor:
        images = images.to(self.device)
        filled = images.new_zeros(batch_size, *images.shape[1:])
        filled[: len(images)] = images
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return spatial_tokens(self.visual, filled)[: len(images)]

    @torch.no_grad()
    def _is_batch_invariant(self, images: Tensor) -> bool:
        """Whether an image's tokens are the same bits at another place and beside blank images."""
        moved = images.roll(3, 0)
        moved[::2] = 0
        tokens, again = self._encode_batch(images, BATCH_SIZE), self._encode_batch(moved, BATCH_SIZE)
        return torch.equal(tokens.roll(3, 0)[1::2], again[1::2])


class FeatureCache:
    """Completes batches whose images are partly cached; stores the tokens it had to encode.

    store: what the workers that prepare the batches read.
    """

    def __init__(self, tower: FrozenTower, store: FeatureStore, writer: FeatureWriter):
        self.tower, self.store, self._writer = tower, store, writer

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Replace what `collate_frames` put into a batch by vision_tokens (B, M, F, V, D).

        They are on the tower's device and in the cache's dtype; those of padding are zero. A batch without
        media is returned unchanged.
        """
        if FRAME_INDEX not in batch:
            return dict(batch)
        known = [batch[FOUND].to(self.tower.device)] if FOUND in batch else []
        if FRESH in batch:
            known.append(self._encode(batch[FRESH], batch[FRESH_KEYS]))
        padding = known[0].new_zeros(1, *self.store.shape)  # at the end, where -1 points
        tokens = torch.cat([*known, padding])[batch[FRAME_INDEX].to(self.tower.device)]
        return {name: value for name, value in batch.items() if name not in PENDING} | {
            "vision_tokens": tokens
        }

    def _encode(self, images: Tensor, keys: list[str]) -> Tensor:
        tokens = self.tower.encode(images)
        for key, own in zip(keys, tokens.cpu(), strict=True):
            self._writer.add(key, own)
        return tokens


def open_feature_cache(
    model: FlamingoForConditionalGeneration,
    preprocess: Mapping[str, Any],
    cache: CacheSection,
    *,
    autocast: torch.dtype | None = None,
    writers: int = 1,
) -> FeatureCache:
    """Open the cache of the outputs of ``model``'s tower, on the model's device.

    Raises UserError if the tower has LoRA, or the folder can be neither created nor used.

    Args:
        preprocess: the transform that gives the pixels (``image_processor.transform_record``).
        autocast: dtype that the trainer computes in.
        writers: processes that write at the same time (ranks).
    """
    source = (model.config.backbones or {}).get("vision") or {}
    architecture = model.config.vision_config
    return open_tower_cache(
        model.vision_encoder, source, architecture, preprocess, cache, autocast=autocast, writers=writers
    )


def open_tower_cache(
    visual: nn.Module,
    source: Mapping[str, Any],
    architecture: Mapping[str, Any] | None,
    preprocess: Mapping[str, Any],
    cache: CacheSection,
    *,
    autocast: torch.dtype | None = None,
    writers: int = 1,
) -> FeatureCache:
    """Open the cache of a tower's outputs without the model around it: the same as `open_feature_cache`'s.

    source, architecture: `VisionBackbone.source` and `VisionBackbone.config`.
    """
    dtype = DTYPES[cache.dtype]
    tower = FrozenTower(visual, dtype, autocast)
    key = features_key(
        visual,
        source,
        architecture,
        preprocess,
        autocast=str(autocast),
        images_at_once=tower.batch_size,
        shape=tower.shape,
        dtype=cache.dtype,
    )
    store = FeatureStore(_folder_for(cache.folder, key), tower.shape, dtype)
    max_bytes = None if cache.max_gib is None else int(cache.max_gib * GIB)
    return FeatureCache(tower, store, FeatureWriter(store, cache.folder, max_bytes, writers))


def _padded(rows: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Return the frame numbers as (B, M, F), padded with -1, and how many each medium has (B, M)."""
    media = max(len(row) for row in rows)
    frames = max(len(medium) for row in rows for medium in row)
    index = torch.full((len(rows), media, frames), -1)
    counts = torch.zeros(len(rows), media, dtype=torch.long)
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            index[b, m, : len(medium)] = torch.tensor(medium)
            counts[b, m] = len(medium)
    return index, counts


def _folder_for(root: Path, key: Mapping[str, Any]) -> Path:
    """Return the folder of a cache key, created if missing; its key.json says what it is for."""
    folder = root / folder_name(key)
    described = folder / "key.json"
    if described.is_file():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_shared(described, (json.dumps(key, indent=2) + "\n").encode(), folder)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(
            f"data.cache.folder: {root} {reason}; name another folder, or free some space"
        ) from None
    return folder
