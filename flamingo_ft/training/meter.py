"""What the log says of a run beside its loss: throughput, memory, learning rates by part, how far gates are open."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from flamingo_ft import processes
from flamingo_ft.formatting import GIB
from flamingo_ft.model.sharding import whole

COUNTED = ("samples", "images", "label_tokens")
GATES = {"attention": "attn_gate", "feed_forward": "ff_gate"}  # in the log -> in a block


class Meter:
    """A clock of training time, which stands still in `paused`, and what is read from it for an entry of the log."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to measure anew."""
        self._began, self._paused = time.monotonic(), 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: evaluation, saving, drawing. One inside another counts once."""
        began, before = time.monotonic(), self._paused
        try:
            yield
        finally:
            self._paused = before + time.monotonic() - began

    def read(self, counts: Counter) -> dict[str, float]:
        """Scalars for an entry of the log, over what was trained since the last; ``counts`` and the clock start anew.

        ``label_tokens_per_second`` and the like are sums over all processes, ``memory_gib`` is the largest of them.
        """
        seconds = max(time.monotonic() - self._began - self._paused, 1e-9)
        measured = [*(counts[name] for name in COUNTED), seconds, memory_gib()]
        *totals, seconds, memory = _over_processes(measured)
        counts.clear()
        self.start()
        rates = {f"{name}_per_second": total / seconds for name, total in zip(COUNTED, totals, strict=True)}
        return rates | {"memory_gib": memory}


def memory_gib() -> float:
    """A GPU: the most that was allocated since the last look. A CPU: what the process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB


def learning_rates(optimizer: Any, first: float) -> dict[str, float]:
    """Of each part that the optimizer's groups are named after, in the step in which the first group's was ``first``;
    the scheduler moves all of them in proportion."""
    groups = optimizer.param_groups
    named = [group for group in groups if "name" in group and "initial_lr" in group]
    return {
        f"learning_rate/{group['name']}": first * group["initial_lr"] / groups[0]["initial_lr"]
        for group in named
    }


def gates(model: torch.nn.Module) -> dict[str, float]:
    """How far each gate is open, tanh in -1..1, by the number of the decoder layer that its block stands before."""
    found = {
        f"gate/{name}/{layer}": getattr(block, attribute).detach()
        for name, attribute in GATES.items()
        for layer, block in enumerate(getattr(model, "gated_cross_attn_layers", ()))
        if block is not None
    }
    if not found:
        return {}
    values = [whole(gate).float().tanh().reshape(()) for gate in found.values()]
    return dict(zip(found, torch.stack(values).tolist(), strict=True))


def _over_processes(measured: list[float]) -> list[float]:
    """Counts summed over the processes, seconds and memory the largest."""
    *counts, seconds, memory = zip(*processes.everyones(measured), strict=True)
    return [*map(sum, counts), max(seconds), max(memory)]
