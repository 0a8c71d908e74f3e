"""Prepared rows on their way from a worker process, the tensors of all of them in one piece.

Each tensor that comes from another process keeps a file open as long as it is alive, and a process may have 1,024 of
them in most places; rows that are kept back for packing alone would have more.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parcel:
    """content: pickled, with a number for each tensor; shapes: of those, with their dtype; pieces: their values, one
    after the other, for each dtype."""

    content: bytes
    shapes: list[tuple[torch.dtype, torch.Size]]
    pieces: dict[torch.dtype, Tensor]


def wrap(value: Any) -> Parcel:
    """A value with CPU tensors anywhere in it, for another process."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    flat = defaultdict(list)
    for tensor in pickler.tensors:
        flat[tensor.dtype].append(tensor.flatten())
    pieces = {dtype: torch.cat(parts) for dtype, parts in flat.items()}
    return Parcel(file.getvalue(), [(tensor.dtype, tensor.shape) for tensor in pickler.tensors], pieces)


def unwrap(parcel: Parcel) -> Any:
    """The value, its tensors in memory of this process."""
    begins, tensors = dict.fromkeys(parcel.pieces, 0), []
    for dtype, shape in parcel.shapes:
        begin, end = begins[dtype], begins[dtype] + shape.numel()
        tensors.append(parcel.pieces[dtype][begin:end].clone().view(shape))
        begins[dtype] = end
    return _Unpickler(io.BytesIO(parcel.content), tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]
