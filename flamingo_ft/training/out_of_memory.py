"""Memory that runs out: reported in a line, with the plan of the run behind it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flamingo_ft.config import Recipe
from flamingo_ft.errors import OutOfMemory, UserError
from flamingo_ft.machine_errors import out_of_memory
from flamingo_ft.plan.plan_report import make_plan_report

REMEDIES = {
    "training": "lower train.batch_size or change what the plan below says",
    "evaluation": "lower eval.batch_size or eval.max_new_tokens; the plan below is that of a training step",
    "loading": "quantize the backbones, or change what the plan below says",
}


@contextmanager
def oom_as_user_error(doing: str) -> Iterator[None]:
    """Memory that runs out in the block becomes `OutOfMemory`; doing: a key of ``REMEDIES``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
        raise OutOfMemory(f"{doing}: {full}; {REMEDIES[doing]}") from None


def with_plan(error: OutOfMemory, recipe: Recipe) -> OutOfMemory:
    """The error, with the recipe's plan as `flamingo-ft plan` has it, where one can be made."""
    error = error.with_traceback(None)
    error.__context__ = None  # the first error: its traceback keeps every frame, and what is in it
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        with oom_as_user_error("training"):
            error.plan = make_plan_report(recipe).record()
    except UserError:  # no room for a plan either, or no sizes to plan for
        error.plan = None
    return error
