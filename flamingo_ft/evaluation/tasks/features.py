"""Features of images for the choice of demonstrations (RICES), from the frozen tower, kept on disk.

Shapes: N images, D width of the tower's tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from flamingo_ft import atomic
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.data.media import open_image
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model.images import READER_VERSION
from flamingo_ft.model.media import encode_distinct

BATCH_SIZE = 16  # images


@torch.no_grad()
def image_features(
    predictor: Predictor,
    paths: Sequence[str],
    folder: Path,
    on_batch: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Return the mean of the tower's tokens of each image (N, D), in float32; of tiled ones, of the whole.

    folder: where they are kept for the next time, by tower, transform and image files. on_batch: called with
    the number of images that are done. Raises UserError for an image that cannot be read.
    """
    file = folder / f"{_key(predictor, paths)}.npy"
    if file.is_file():
        on_batch(len(paths))
        return np.load(file)
    images, tower = predictor.processor.image_processor, predictor.model.vision_encoder
    features = []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        pixels = torch.stack([images.whole_view(open_image(path)) for path in batch])
        features.append(encode_distinct(tower, pixels.to(predictor.model.device)).float().mean(1).cpu())
        on_batch(len(batch))
    result = torch.cat(features).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.file_in_place(file) as partial, partial.open("wb") as opened:
        np.save(opened, result)
    return result


def _key(predictor: Predictor, paths: Sequence[str]) -> str:
    """Return a digest of what the features depend on."""
    files = []
    for path in paths:
        status = os.stat(path)
        files.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    images = predictor.processor.image_processor
    transform = [images.open_clip_preprocess, images.tiling is not None]
    key = [tensors_sha256(predictor.model.vision_encoder), transform, READER_VERSION, files]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
