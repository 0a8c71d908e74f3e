"""Track the bytes of all live tensors, and their peak, as operators allocate and release them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from .compat import FakeTensor, TorchDispatchMode

CUDA_ALLOCATION_BLOCK = 512  # bytes; the caching allocator rounds up to it (c10/cuda/CUDACachingAllocator.h)
ITEM = "aten::_local_scalar_dense"  # the operator behind Tensor.item()
GEMM_4BIT = "bitsandbytes::gemm_4bit"


class MemoryTracker(TorchDispatchMode):
    """Count every storage, real or fake, from the operator that creates it until nothing refers to it.

    ``Tensor.item()`` of a fake tensor returns 0 or False. Memory that an operator allocates and frees
    internally is not counted, except for `_workspace`.

    torch.distributed._tools.mem_tracker.MemTracker is not used: it is private and 950 lines long, rounds to
    the allocator's blocks only for tensors on CUDA, which a plan made on a machine without a GPU cannot have,
    and knows neither `item` of fake tensors nor what bitsandbytes allocates internally.

    Args:
        block: round the size of each storage up to a multiple of it, in bytes.

    Attributes:
        current, peak: live bytes, now and at most.
        gradients: what the caller declares to be gradients; ``gradients_at_peak`` is its value at the peak.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block = block
        self.current = self.peak = self.gradients = self.gradients_at_peak = 0
        self._sizes: dict[int, int] = {}  # by the id of the live storage

    def track(self, tensors: Iterable[Tensor]) -> int:
        """Count existing tensors; return the bytes that were not counted before."""
        before = self.current
        for tensor in tensors:
            self._count(tensor)
        return self.current - before

    def reset_peak(self) -> None:
        self.peak, self.gradients_at_peak = self.current, self.gradients

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.name() == ITEM and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0
        result = func(*args, **(kwargs or {}))
        self._update_peak(self.current + _workspace(func, args))
        for tensor in _tensors(result):
            self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps one Python object per storage, as long as it lives
        if key not in self._sizes and tensor.device.type != "meta":
            self._sizes[key] = -(-storage.nbytes() // self.block) * self.block
            self.current += self._sizes[key]
            self._update_peak(self.current)
            weakref.finalize(storage, self._release, key)

    def _update_peak(self, live: int) -> None:
        if live > self.peak:
            self.peak, self.gradients_at_peak = live, self.gradients

    def _release(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operator's results, which may be in a tuple or list."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def _workspace(function: Any, args: tuple) -> int:
    """Return the bytes of the matrix that bitsandbytes dequantizes inside its 4-bit product."""
    if function.name() != GEMM_4BIT:
        return 0
    inputs, _, shape = args[:3]
    return prod(shape) * inputs.element_size()
