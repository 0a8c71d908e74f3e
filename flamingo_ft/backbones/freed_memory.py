"""Give freed memory back to the system while weights are read, quantized or merged.

glibc keeps what is freed below a threshold that rises to 32 MiB as blocks are freed, so the matrices as they
were read would stay in the process beside what became of them. mallopt(3) lowers it, on Linux with glibc.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
INSIDE = 128 * 1024  # bytes, glibc's initial threshold
AFTERWARDS = 32 * 2**20  # where its own adjustment ends on a 64-bit system, for speed; it trims at twice that
SET_BY_USER = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"

_blocks = 0  # that are entered now, one inside the other


@contextmanager
def freed_memory_returned() -> Generator[None]:
    """Inside the ``with`` block, give blocks of 128 KiB or more back to the system when they are freed.

    Does nothing without glibc, or if the environment sets the thresholds.
    """
    global _blocks
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    _blocks += 1
    mallopt(M_MMAP_THRESHOLD, INSIDE)
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            mallopt(M_MMAP_THRESHOLD, AFTERWARDS)
            mallopt(M_TRIM_THRESHOLD, 2 * AFTERWARDS)


def _mallopt() -> Callable[[int, int], int] | None:
    if sys.platform != "linux" or any(variable in os.environ for variable in SET_BY_USER):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
