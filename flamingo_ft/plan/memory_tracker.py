"""How many bytes of tensors are alive, and the most that ever were, counted as operators make and release them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CUDA_ALLOCATION_BLOCK = (
    512  # bytes; torch's caching allocator hands out multiples of it (c10/cuda/CUDACachingAllocator.h)
)
ANSWERS = {"_local_scalar_dense"}  # operators that ask a tensor for its content


class MemoryTracker(TorchDispatchMode):
    """Counts storages from the operator that makes them until nothing refers to them, on real and on fake tensors.

    block: sizes are rounded up to it, in bytes. ``current`` and ``peak`` are in bytes; ``gradients`` is what callers
    declare as such, and ``gradients_at_peak`` what of it there was at the peak.

    A question for the content of a tensor that has none is answered with 0 or False. What an operator allocates and
    releases inside itself is not seen, except for `_inside`.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block = block
        self.current = self.peak = self.gradients = self.gradients_at_peak = 0
        self._sizes: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that are there already; returns the bytes that were not counted before."""
        before = self.current
        for tensor in tensors:
            self._count(tensor)
        return self.current - before

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self.gradients_at_peak = self.current, self.gradients

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function._opname in ANSWERS and isinstance(args[0], torch._subclasses.FakeTensor):
            return False if args[0].dtype == torch.bool else 0
        result = function(*args, **(kwargs or {}))
        self._mark(self.current + _inside(function, args))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes and tensor.device.type != "meta":
            self._sizes[key] = -(-storage.nbytes() // self.block) * self.block
            self.current += self._sizes[key]
            self._mark(self.current)
            weakref.finalize(storage, self._release, key)

    def _mark(self, live: int) -> None:
        if live > self.peak:
            self.peak, self.gradients_at_peak = live, self.gradients

    def _release(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)


def _inside(function: Any, args: tuple) -> int:
    """Bytes of the matrix that bitsandbytes restores inside its 4-bit product, where there is no kernel without."""
    if function.namespace == "bitsandbytes" and function._opname == "gemm_4bit":
        inputs, _, shape = args[:3]
        return prod(shape) * inputs.element_size()
    return 0
