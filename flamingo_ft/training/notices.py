"""What a user should read before the first step: memory, held-out images that are trained on, answers cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil
import torch

from flamingo_ft.backbones.device import default_device
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.eval_split import find_overlap
from flamingo_ft.data.opened_data import MAX_VALIDATED_ROWS
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.answer_lengths import measure_answers
from flamingo_ft.formatting import gib
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.plan.plan_report import CONTEXT, FRAGMENTATION
from flamingo_ft.plan.planner import plan_memory


def memory_line(recipe: Recipe) -> str:
    """One line that compares the planned peak with the memory that is free on the device of this process."""
    device = default_device()
    if recipe.train.fsdp:
        return "memory: not planned, train.fsdp spreads the weights over the processes"
    try:
        peak = plan_memory(recipe, device="cuda" if device.type == "cuda" else "cpu").peak
    except UserError as error:
        return f"memory: not planned ({error})"
    if device.type == "cuda":
        peak, owner = peak * (1 + FRAGMENTATION) + CONTEXT, f"on {torch.cuda.get_device_name(device)}"
        free = torch.cuda.mem_get_info(device)[0]
    else:
        owner, free = "of host RAM", psutil.virtual_memory().available
    line = f"memory: planned peak {gib(peak)} GiB, {gib(free)} GiB {owner} are free"
    return line if peak <= free else f"warning: {line}; flamingo-ft plan says what to change"


def warnings_about_evaluation(
    data: OpenedData, held_out: Sequence[Sample], processor: FlamingoProcessor, max_new_tokens: int
) -> Iterator[str]:
    """A line each for held-out images that are trained on too, and for reference answers longer than evaluation allows."""
    overlap = _overlap(data, held_out)
    if overlap:
        yield f"warning: {overlap}"
    too_long = measure_answers(processor, held_out, max_new_tokens).warning
    if too_long:
        yield f"warning: {too_long}"


def _overlap(data: OpenedData, held_out: Sequence[Sample]) -> str | None:
    """Streams are not read through for it."""
    if not held_out or not all(
        mixed.source.indexed and mixed.size <= MAX_VALIDATED_ROWS for mixed in data.train
    ):
        return None
    found = find_overlap(data.samples(data.train), held_out)
    return found and (
        f"{found.count:,} of {len(held_out):,} held-out samples show an image that is trained on too "
        f"(first {found.eval}, trained on in {found.train}); accuracy on them says little: hold them out"
    )
