"""Reduce a tensor to a few numbers such that a deviation of any single entry changes them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tests.golden.deterministic_weights import hashed_words


@lru_cache(maxsize=256)
def _assignment(size: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Return bucket and sign of each of `size` entries."""
    words = hashed_words(f"sketch.{size}.{buckets}", size)
    bucket = torch.from_numpy((words % np.uint64(buckets)).astype(np.int64))
    sign = torch.from_numpy(1.0 - 2.0 * ((words >> np.uint64(40)) & np.uint64(1)).astype(np.float64))
    return bucket, sign


def sketch(tensor: Tensor, buckets: int) -> Tensor:
    """Return the entries of `tensor`, each with a fixed sign, summed into fixed buckets: (buckets,), float64.

    Every entry counts in exactly one bucket, so an entry that is off by e moves one number by e (a count
    sketch, Charikar et al. 2002). A tensor with no more entries than buckets is kept as it is, padded with
    zeros.
    """
    flat = tensor.detach().double().flatten()
    result = torch.zeros(buckets, dtype=torch.float64)
    if flat.numel() <= buckets:
        result[: flat.numel()] = flat
        return result
    bucket, sign = _assignment(flat.numel(), buckets)
    return result.index_add_(0, bucket, sign * flat)
