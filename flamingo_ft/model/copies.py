"""Images that are in a batch more than once, so that each is encoded once."""

from __future__ import annotations

import torch
from torch import Tensor

# Bits are compared, not numbers: their sum does not depend on the order of summation, and NaN equals itself.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_copies(images: Tensor) -> tuple[list[int], list[int]]:
    """For images (N, ...): the indices (K,) of the different ones, and for each of the N its number among these."""
    bits = images.contiguous().view(BITS[images.element_size()]).flatten(1)
    first: list[int] = []
    source: list[int] = []
    alike: dict[int, list[int]] = {}
    for index, checksum in enumerate(bits.sum(1, dtype=torch.int64).tolist()):
        candidates = alike.setdefault(checksum, [])
        known = next((number for number in candidates if torch.equal(bits[first[number]], bits[index])), None)
        if known is None:
            known = len(first)
            candidates.append(known)
            first.append(index)
        source.append(known)
    return first, source
