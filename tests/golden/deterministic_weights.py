"""Weights and inputs that are the same on every machine and in every version of torch and numpy.

Golden numbers need weights that can be made again. These are a hash of the parameter's name and of the
entry's index (splitmix64, Steele et al. 2014, on unsigned 64-bit integers), not the output of a random number
generator, whose stream a release may change.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import nn

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def hashed_words(name: str, count: int) -> np.ndarray:
    """Return `count` unsigned 64-bit words that depend only on `name` and their index."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    words = seed + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN_GAMMA
    for shift, factor in _MIX:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> np.uint64(31))


def uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    """Return a float32 tensor of `shape`, uniform in [low, high)."""
    unit = (hashed_words(name, math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((low + (high - low) * unit).astype(np.float32)).reshape(shape)


def integers(name: str, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
    """Return an int64 tensor of `shape` with values in [low, high)."""
    words = hashed_words(name, math.prod(shape)) % np.uint64(high - low)
    return torch.from_numpy(words.astype(np.int64) + low).reshape(shape)


def parameter_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return float32 values for the parameter `name`: norms near 1, gates open, matrices of about unit gain.

    Embeddings are larger: with small ones the images dominate the text, and generation repeats one token.
    """
    if name.endswith("_gate"):
        return uniform(name, shape, 0.5, 1.0)
    if len(shape) == 1 and name.endswith(".weight"):
        return uniform(name, shape, 0.8, 1.2)
    if len(shape) == 1:
        return uniform(name, shape, -0.1, 0.1)
    if name.endswith(EMBEDDINGS):
        return uniform(name, shape, -0.7, 0.7)
    bound = 1.5 / math.sqrt(math.prod(shape[1:]))
    return uniform(name, shape, -bound, bound)


@torch.no_grad()
def fill(module: nn.Module, prefix: str) -> None:
    """Set every parameter of `module` to `parameter_values` of `prefix` + its path in `module`."""
    for path, parameter in module.named_parameters():
        parameter.copy_(parameter_values(prefix + path, tuple(parameter.shape)))
