"""Checks before the first step: machine, precision, the model's loss, packing, memory, held-out samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from flamingo_ft import processes
from flamingo_ft.backbones.precision import DTYPES, autocast_dtype
from flamingo_ft.backbones.quantization import Quantization, require_bitsandbytes
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.boxes import cut_boxes, cut_boxes_warning
from flamingo_ft.data.eval_split import find_overlap
from flamingo_ft.data.opened_data import MAX_VALIDATED_ROWS
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import measure_answers
from flamingo_ft.formatting import gib, plural
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.plan.plan_report import CONTEXT, FRAGMENTATION
from flamingo_ft.plan.planner import plan_memory
from flamingo_ft.processes import default_device

HALF_DTYPES = (torch.float16, torch.bfloat16)
DOCUMENT_LENGTHS = (7, 5, 9)  # tokens
LOSS_RTOL, LOSS_RTOL_ROUNDED = 1e-4, 0.02  # in float32, and with any lower precision
# Relative to the largest logit.
LOGITS_TOLERANCE, LOGITS_TOLERANCE_ROUNDED = 1e-4, 0.05


# --- the machine ---


def check_machine(train_config: TrainSection) -> None:
    """Raise UserError for settings that this machine or this launch cannot run, before anything is loaded."""
    _refuse_data_parallel(torch.cuda.device_count())
    _refuse_accelerate_fsdp(os.environ)
    if train_config.fsdp and processes.world_size() == 1:
        raise UserError(
            "train.fsdp: got one process, and sharding needs several; start them with "
            "torchrun --nproc-per-node 2 -m flamingo_ft train ..., or set train.fsdp to false"
        )
    if train_config.optimizer not in ("adamw", "muon"):
        require_bitsandbytes(f"train.optimizer: {train_config.optimizer}", instead="adamw")
    if train_config.activation_offload and not torch.cuda.is_available():
        raise UserError("train.activation_offload: got true, but no GPU is available; set it to false")


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


# --- precision ---


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
            f"train.precision: got {precision}, which needs a GPU, but no GPU is available; "
            "use fp32, bf16 or auto"
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


# --- loss and packing checks ---


@torch.no_grad()
def check_loss(trainer: Trainer) -> None:
    """Compare TRL's loss with the model's own on a short text. Raises UserError if they differ.

    TRL computes it from the last hidden state and the output head's matrix, never forming all logits. That is
    silently wrong for families whose head is more than a matrix (a transform, a scale unknown to TRL) or
    whose own loss does not shift labels by one token.
    """
    model = cast(FlamingoForConditionalGeneration, trainer.model)
    was_training = model.training
    model.eval()
    processor = cast(FlamingoProcessor, trainer.processing_class)
    ids = _sample_text(processor).to(model.device)
    with trainer.compute_loss_context_manager():
        own = _own_loss(model, ids, getattr(trainer, "temperature", 1.0))
        try:
            fused = float(model(input_ids=ids, labels=ids, fused_lm_head=True).loss)
        except (RuntimeError, AttributeError) as error:
            reraise_machine_error(error)
            raise UserError(
                _loss_message(model, f"computing it fails ({str(error).splitlines()[0]})")
            ) from None
    model.train(was_training)
    exact = model.lang_encoder.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    if abs(own - fused) > (LOSS_RTOL if exact else LOSS_RTOL_ROUNDED) * abs(own):
        raise UserError(_loss_message(model, f"it is {fused:.4f}, the model computes {own:.4f}"))


def _own_loss(model: FlamingoForConditionalGeneration, ids: Tensor, temperature: float) -> float:
    """Return the model's own loss on token ids (1, T), with logits divided by a sampling temperature."""
    output = model(input_ids=ids, labels=ids, use_cache=False)
    if temperature == 1:
        return float(output.loss)
    return float(cross_entropy(output.logits[0, :-1].float() / temperature, ids[0, 1:]))


def _sample_text(processor: FlamingoProcessor) -> Tensor:
    """Return token ids (1, T) of a short text without tokens that the Flamingo added."""
    encoded = processor.tokenizer(
        "A picture of a house by the sea.", add_special_tokens=False, return_tensors="pt"
    )
    return encoded["input_ids"]


def _loss_message(model: FlamingoForConditionalGeneration, reason: str) -> str:
    family = model.config.get_text_config().model_type
    return (
        f"model.language: TRL's training loss is wrong for a {family} model: {reason}; "
        "choose another model family"
    )


@torch.no_grad()
def check_packing(model: FlamingoForConditionalGeneration, rows: int = 1) -> None:
    """Compare documents packed into one row, in a batch of ``rows`` such rows, with each document alone.

    Raises UserError if their logits differ. transformers separates documents in self-attention where
    positions start again at 0, for families that build their masks the usual way. With positions from the
    mask (ALiBi), with a state that runs along the row (state-space models, recurrences, convolutions) or with
    some attention kernels, documents would silently attend to each other.
    """
    was_training = model.training
    model.eval()
    ids = _random_tokens(model)
    try:
        packed = model(input_ids=ids.expand(rows, -1), **_packing_inputs(ids, rows)).logits[-1]
    except (TypeError, ValueError, RuntimeError) as error:
        reraise_machine_error(error)
        reason = f"does not accept document boundaries ({str(error).splitlines()[0]})"
        raise UserError(_packing_message(model, reason)) from None
    finally:
        model.train(was_training)
    model.eval()
    documents = ids.split(DOCUMENT_LENGTHS, dim=1)
    alone = torch.cat([model(input_ids=document, use_cache=False).logits[0] for document in documents])
    model.train(was_training)
    exact = model.lang_encoder.dtype == torch.float32
    tolerance = (LOGITS_TOLERANCE if exact else LOGITS_TOLERANCE_ROUNDED) * alone.abs().max()
    if not (packed - alone).abs().max() <= tolerance:
        raise UserError(_packing_message(model, "attends across document boundaries"))


def _random_tokens(model: FlamingoForConditionalGeneration) -> Tensor:
    """Return random token ids (1, T) below the media token and all other added tokens."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    first_added = min([cast(int, config.media_token_id), *(config.new_token_ids or [])])
    return torch.randint(first_added, (1, sum(DOCUMENT_LENGTHS)), generator=generator).to(model.device)


def _packing_inputs(ids: Tensor, rows: int) -> dict[str, Tensor]:
    """Return document ids and position ids (rows, T) of the packed documents."""
    documents = torch.cat([torch.full((length,), index) for index, length in enumerate(DOCUMENT_LENGTHS)])
    positions = torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])
    inputs = {"document_ids": documents, "position_ids": positions}
    return {name: tensor.to(ids.device).expand(rows, -1) for name, tensor in inputs.items()}


def _packing_message(model: FlamingoForConditionalGeneration, reason: str) -> str:
    family = model.config.get_text_config().model_type
    return (
        f"data.packing: a {family} model {reason}; set data.packing to false "
        "(data.group_by_length=true also reduces padding)"
    )


# --- notices: planned memory, held-out samples ---


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
    planned = f"planned peak {gib(peak)} GiB" + ("" if device.type == "cuda" else " besides Python's own")
    line = f"memory: {planned}, {gib(free)} GiB {where} are free"
    return line if peak <= free else f"warning: {line}; flamingo-ft plan says what to change"


def evaluation_warnings(
    data: OpenedData, eval_samples: Sequence[Sample], processor: FlamingoProcessor, max_new_tokens: int
) -> Iterator[str]:
    """Warn of held-out images that are also trained on, of held-out boxes that are cut off, and of answers
    longer than ``max_new_tokens``.
    """
    overlap = _overlap(data, eval_samples)
    if overlap:
        yield f"warning: {overlap}"
    cut, boxes = sum(map(cut_boxes, eval_samples)), sum(len(sample.boxes) for sample in eval_samples)
    if line := cut_boxes_warning(cut, boxes, "held-out boxes"):
        yield f"warning: {line}"
    too_long = measure_answers(processor, eval_samples, max_new_tokens).warning
    if too_long:
        yield f"warning: {too_long}"


def _overlap(data: OpenedData, eval_samples: Sequence[Sample]) -> str | None:
    """Describe images in both training and held-out samples; None if a source is a stream or too large."""
    if not eval_samples or not all(
        weighted.source.indexed and weighted.size <= MAX_VALIDATED_ROWS for weighted in data.train
    ):
        return None
    overlap = find_overlap(data.samples(data.train), eval_samples)
    if overlap is None:
        return None
    return (
        f"an image of {overlap.count:,} of {plural(len(eval_samples), 'held-out sample')} is trained on too "
        f"(first {overlap.eval}, trained on in {overlap.train}), so accuracy on "
        f"{'it' if overlap.count == 1 else 'them'} says little; leave these images out of training"
    )
