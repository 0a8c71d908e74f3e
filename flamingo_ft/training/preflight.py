"""Before a run: what this machine cannot do, planned memory, and doubtful held-out samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import psutil
import torch

from flamingo_ft import processes
from flamingo_ft.backbones.quantization import DTYPES, Quantization, require_bitsandbytes
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.eval_split import find_overlap
from flamingo_ft.data.opened_data import MAX_VALIDATED_ROWS
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import measure_answers
from flamingo_ft.formatting import gib
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.plan.plan_report import CONTEXT, FRAGMENTATION
from flamingo_ft.plan.planner import plan_memory
from flamingo_ft.processes import default_device

from .arguments import autocast_dtype

HALF_DTYPES = (torch.float16, torch.bfloat16)


def check_machine(train_config: TrainSection) -> None:
    """Raise UserError for settings that this machine or this launch cannot run, before anything is loaded."""
    _refuse_data_parallel(torch.cuda.device_count())
    _refuse_accelerate_fsdp(os.environ)
    if train_config.fsdp and processes.world_size() == 1:
        raise UserError(
            "train.fsdp: got one process, and sharding needs several; start them with "
            "torchrun --nproc-per-node 2 -m flamingo_ft train ..., or set train.fsdp to false"
        )
    if train_config.optimizer != "adamw":
        require_bitsandbytes(f"train.optimizer: {train_config.optimizer}", instead="adamw")
    if train_config.activation_offload and not torch.cuda.is_available():
        raise UserError(
            "train.activation_offload: there is no GPU to offload activations from; set it to false"
        )


def _refuse_data_parallel(gpus: int) -> None:
    """Refuse several GPUs in one process: Trainer's `nn.DataParallel` is slow, and wrong for this model."""
    if gpus > 1 and processes.world_size() == 1:
        raise UserError(
            f"got {gpus} GPUs and one process; use one GPU with CUDA_VISIBLE_DEVICES=0, or all of them with "
            f"torchrun --nproc-per-node {gpus} -m flamingo_ft train ..."
        )


def _refuse_accelerate_fsdp(environment: Mapping[str, str]) -> None:
    """Refuse accelerate's own FSDP, which would neither shard by our units nor keep our parameter groups."""
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "accelerate: its configuration turns on FSDP, which cannot shard a Flamingo; use one "
            "without FSDP (recipes/accelerate/ddp.yaml), and set train.fsdp to true"
        )


def check_precision(recipe: Recipe) -> None:
    """Raise UserError for a precision that this machine or this recipe cannot use."""
    precision = recipe.train.precision
    autocast = autocast_dtype(precision)
    if autocast == torch.float16:
        _check_float16(recipe)
    for name in ("vision", "language"):
        quantization = Quantization.of(getattr(recipe.model, name))
        if quantization is None or autocast not in HALF_DTYPES or quantization.dtype not in HALF_DTYPES:
            continue
        if quantization.dtype != autocast:
            both = next(word for word, dtype in DTYPES.items() if dtype == autocast)
            raise UserError(
                f"model.{name}.compute_dtype: {quantization.compute_dtype} is "
                f"{_dtype_name(quantization.dtype)} here, but train.precision: {precision} is "
                f"{_dtype_name(autocast)}; use {both} for both"
            )


def _check_float16(recipe: Recipe) -> None:
    precision = recipe.train.precision
    if not torch.cuda.is_available():
        raise UserError(
            f"train.precision: {precision} needs a GPU, and there is none; use fp32, bf16 or auto"
        )
    if recipe.trainable.dtype == "bf16":
        raise UserError(
            f"trainable.dtype: got bf16, but train.precision {precision} is float16 on this GPU, which needs "
            "trainable parameters in fp32; use fp32"
        )
    if recipe.train.optimizer_in_backward:
        raise UserError(
            f"train.optimizer_in_backward: train.precision {precision} is float16 on this GPU, and a step "
            "inside the backward pass cannot be undone when a scaled gradient overflows; use "
            "train.precision=fp32, or set it to false"
        )


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def memory_notice(recipe: Recipe) -> str:
    """Return a line that compares the planned peak with the free memory of this process's device."""
    device = default_device()
    if recipe.train.fsdp:
        return "memory: not planned, train.fsdp shards the weights over the processes"
    try:
        peak = plan_memory(recipe, device="cuda" if device.type == "cuda" else "cpu").peak
    except UserError as error:
        return f"memory: not planned ({error})"
    if device.type == "cuda":
        peak = peak * (1 + FRAGMENTATION) + CONTEXT
        free, where = torch.cuda.mem_get_info(device)[0], f"on {torch.cuda.get_device_name(device)}"
    else:
        free, where = psutil.virtual_memory().available, "of host RAM"
    line = f"memory: planned peak {gib(peak)} GiB, {gib(free)} GiB {where} are free"
    return line if peak <= free else f"warning: {line}; flamingo-ft plan says what to change"


def evaluation_warnings(
    data: OpenedData, eval_samples: Sequence[Sample], processor: FlamingoProcessor, max_new_tokens: int
) -> Iterator[str]:
    """Warn of held-out images that are also trained on, and of answers longer than ``max_new_tokens``."""
    overlap = _overlap(data, eval_samples)
    if overlap:
        yield f"warning: {overlap}"
    too_long = measure_answers(processor, eval_samples, max_new_tokens).warning
    if too_long:
        yield f"warning: {too_long}"


def _overlap(data: OpenedData, eval_samples: Sequence[Sample]) -> str | None:
    """Describe images in both training and held-out samples; None if a source is a stream or too large."""
    if not eval_samples or not all(
        mixed.source.indexed and mixed.size <= MAX_VALIDATED_ROWS for mixed in data.train
    ):
        return None
    found = find_overlap(data.samples(data.train), eval_samples)
    if found is None:
        return None
    return (
        f"{found.count:,} of {len(eval_samples):,} held-out samples show an image that is trained on too "
        f"(first {found.eval}, trained on in {found.train}), so accuracy on them says little; "
        "hold these images out"
    )
