"""The training process's side: missing tokens are encoded, rounded, kept, and put into the batch.

Shapes: B samples, M media, F frames, N images, C channels, H height, W width, V visual tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_ft import atomic
from flamingo_ft.backbones.quantization import DTYPES, quantization_formats
from flamingo_ft.backbones.tower import spatial_tokens
from flamingo_ft.config import CacheSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import GIB
from flamingo_ft.model import FlamingoForConditionalGeneration

from .pending import FOUND, FRAME_INDEX, FRESH, FRESH_KEYS
from .store import FeatureStore, FeatureWriter, features_key, folder_name

AT_ONCE = 8  # images
PENDING = (FRAME_INDEX, FOUND, FRESH, FRESH_KEYS)


class FrozenTower:
    """A tower run in one fixed shape, so that an image's tokens do not depend on what it is encoded with.

    at_once: images of that shape, filled up with zeros. 1 where the bits of an image's tokens change with its place or
    its neighbours; so they do in 8 bits, where an outlier of one image leaves a column of all unrounded.
    autocast: number format that the trainer computes in, None for none.
    """

    def __init__(self, visual: nn.Module, dtype: torch.dtype, autocast: torch.dtype | None = None):
        if any(".lora_" in name for name, _ in visual.named_parameters()):
            raise UserError(
                "data.cache: LoRA changes the tower, so its tokens cannot be kept; set one of them to null"
            )
        self.visual, self.dtype, self.autocast = visual, dtype, autocast
        self.device = next(visual.parameters()).device
        size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
        trial = torch.randn(AT_ONCE, 3, *size, generator=torch.Generator().manual_seed(0))
        self.at_once = (
            AT_ONCE if "int8" not in quantization_formats(visual) and self._keeps_apart(trial) else 1
        )
        self.shape = tuple(self.encode(trial[:1]).shape[1:])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to tokens (N, V, D) in the kept number format."""
        tokens = [self._encode_some(some, self.at_once) for some in images.split(self.at_once)]
        return torch.cat(tokens).to(self.dtype)

    def _encode_some(self, images: Tensor, at_once: int) -> Tensor:
        images = images.to(self.device)
        filled = images.new_zeros(at_once, *images.shape[1:])
        filled[: len(images)] = images
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return spatial_tokens(self.visual, filled)[: len(images)]

    @torch.no_grad()
    def _keeps_apart(self, images: Tensor) -> bool:
        """Whether each image has the same tokens, to the bit, at another place and beside blank images."""
        moved = images.roll(3, 0)
        moved[::2] = 0
        tokens, again = self._encode_some(images, AT_ONCE), self._encode_some(moved, AT_ONCE)
        return torch.equal(tokens.roll(3, 0)[1::2], again[1::2])


class FeatureCache:
    """Completes batches whose images are partly tokens already; keeps what it had to encode.

    store: for the workers that prepare the batches.
    """

    def __init__(self, tower: FrozenTower, store: FeatureStore, writer: FeatureWriter):
        self.tower, self.store, self._writer = tower, store, writer

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with what `collate_frames` gave, to one with vision_tokens (B, M, F, V, D) in its place.

        They are on the tower's device and in the cache's number format; those of padding are zero. A batch without
        media stays as it is.
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
    """The tokens of ``model``'s tower as a recipe wants them kept, on the device where the model is.

    preprocess: the transform that gives the pixels (``image_processor.open_clip_preprocess``). autocast: the number
    format the trainer computes in. writers: processes that add at the same time (ranks).

    Raises UserError where LoRA is on the tower and where the folder can be neither made nor used.
    """
    dtype = DTYPES[cache.dtype]
    tower = FrozenTower(model.vision_encoder, dtype, autocast)
    key = features_key(
        model,
        preprocess,
        autocast=str(autocast),
        images_at_once=tower.at_once,
        shape=tower.shape,
        dtype=cache.dtype,
    )
    store = FeatureStore(_folder_for(cache.folder, key), tower.shape, dtype)
    max_bytes = None if cache.max_gib is None else int(cache.max_gib * GIB)
    return FeatureCache(tower, store, FeatureWriter(store, cache.folder, max_bytes, writers))


def _folder_for(root: Path, key: Mapping[str, Any]) -> Path:
    """The key's own folder, which says in key.json what it is for; made where it is missing."""
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
