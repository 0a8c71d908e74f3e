"""Memory that runs out: told in a line, with the plan of the run behind it."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flamingo_ft.config import Recipe
from flamingo_ft.errors import OutOfMemory, UserError

from .plan.report import make_report

# How torch, cuBLAS and bitsandbytes say that memory ran out, where they have no error of its own for it.
PHRASES = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
TRIED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
REMEDIES = {
    "training": "lower train.batch_size or change what the plan below says",
    "evaluation": "lower eval.batch_size or eval.max_new_tokens; the plan below is that of a training step",
    "loading": "quantize the backbones, or change what the plan below says",
}


@contextmanager
def told_if_full(doing: str) -> Iterator[None]:
    """Memory that runs out in the block becomes `OutOfMemory`; doing: a key of ``REMEDIES``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = failed_allocation(error)
        if told is None:
            raise
        raise OutOfMemory(f"{doing}: {told}; {REMEDIES[doing]}") from None


def failed_allocation(error: Exception) -> str | None:
    """What of the machine is full, and what did not fit; None for another error."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(phrase in text for phrase in PHRASES):
        return None
    size = TRIED.search(text)
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA" in text or "CUBLAS" in text
    owner = "the GPU's" if on_gpu else "the computer's"
    return f"{owner} memory is full" + (f" (tried to allocate {size[1]} more)" if size else "")


def with_plan(error: OutOfMemory, recipe: Recipe) -> OutOfMemory:
    """The error, what it tells of gone from memory, with the recipe's plan as `flamingo-ft plan` has it, where one can be
    made."""
    error = error.with_traceback(None)
    error.__context__ = None  # the first error: its traceback keeps every frame, and what is in it
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        with told_if_full("training"):
            error.plan = make_report(recipe).record()
    except UserError:  # no room for a plan either, or no sizes to plan for
        error.plan = None
    return error
