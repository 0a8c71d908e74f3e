"""One training step on fake tensors, counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.adapters.prepare import frozen_copy
from flamingo_ft.backbones.tower import spatial_tokens
from flamingo_ft.config import TrainSection
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.conditioning import Media
from flamingo_ft.model.media import MediaInput, no_media

from .cuda_emulation import Device, emulate_device, recompute_context
from .longest_batch import Batch
from .memory_tracker import CUDA_ALLOCATION_BLOCK, MemoryTracker

STASH = 5  # activations that TRL's offloading keeps on the GPU while they are copied (OffloadActivations)
SMALLEST_OFFLOADED = 1024  # bytes
METRICS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks of the fused head
DPO_METRICS = ("log_probs", "entropy", "mean_logits", "is_top1")  # DPOTrainer, of the policy


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device in a step that is not the first: weights and optimizer state throughout, gradients once all
    are there, and the most that was alive, with the gradients among it. paged: state that may leave the device."""

    weights: int
    optimizer: int
    paged: int
    gradients: int
    peak: int
    gradients_at_peak: int


def simulate_step(
    model: FlamingoForConditionalGeneration, batch: Batch, wanted: TrainSection, device: Device
) -> StepMemory:
    """Forward, loss and backward as the trainer runs them; inside the FakeTensorMode that the model was made in."""
    trained = trainable_parameters(model).values()
    if wanted.gradient_checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": partial(recompute_context, device)}
        )
    models = [model, frozen_copy(model)] if wanted.method == "dpo" else [model]
    model.train()
    with (
        MemoryTracker(CUDA_ALLOCATION_BLOCK if device == "cuda" else 1) as live,
        emulate_device(device),
        _full_batch(models, batch),
    ):
        weights = live.hold(tensor for one in models for tensor in chain(one.parameters(), one.buffers()))
        state = [optimizer_state(parameter, wanted.optimizer, device) for parameter in trained]
        optimizer = live.current - weights
        gradients = _watch_gradients(trained, live, wanted.optimizer_in_backward)
        live.restart()
        _forward_and_backward(models, batch, wanted, device)
    return StepMemory(
        weights,
        optimizer,
        sum(paged for _, paged in state),
        sum(gradients.values()),
        live.peak,
        live.gradients_at_peak,
    )


def autocast_dtype(precision: str, device: Device) -> torch.dtype | None:
    """The format of the trainer's autocast on ``device``, None for none. What an older GPU chooses is as large."""
    automatic = "bf16" if device == "cuda" else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[
        automatic if precision == "auto" else precision
    ]


def _forward_and_backward(
    models: Sequence[FlamingoForConditionalGeneration], batch: Batch, wanted: TrainSection, device: Device
) -> None:
    """All micro-batches of a step; their tensors are there together, as the trainer fetches them."""
    # The samples that the last batch was put together from are still there, in the computer's memory.
    samples = batch.media() if device == "cpu" else None
    steps = wanted.gradient_accumulation_steps
    batches = [batch.tensors() for _ in range(min(steps, 2))]  # from the second on, all are alike
    waiting = _waiting(batches[0], steps - len(batches), CUDA_ALLOCATION_BLOCK if device == "cuda" else 1)
    autocast = autocast_dtype(wanted.precision, device)
    for inputs in batches:
        with _offloaded(wanted.activation_offload and device == "cuda"):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = _loss(*models, inputs=inputs, device=device)
            loss.backward()
        del loss
    del samples, waiting


def _waiting(inputs: dict[str, Tensor], batches: int, block: int) -> list[Tensor]:
    """The memory of so many further batches like ``inputs``, each tensor in whole blocks of the allocator."""
    sizes = [-(-tensor.nbytes // block) * block for tensor in inputs.values()]
    return [torch.zeros(batches, size, dtype=torch.uint8) for size in sizes] if batches else []


def _watch_gradients(trained: Any, live: MemoryTracker, at_once: bool) -> dict[int, int]:
    """Bytes of each parameter's gradient, filled in as they come; dropped as they come where the step is ``at_once``."""
    sizes: dict[int, int] = {}

    def arrived(parameter: Tensor) -> None:
        if at_once:
            parameter.grad = None
        elif id(parameter) not in sizes:
            sizes[id(parameter)] = parameter.grad.nbytes
            live.gradients += parameter.grad.nbytes

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(arrived)
    return sizes


def _loss(
    model: FlamingoForConditionalGeneration,
    reference: FlamingoForConditionalGeneration | None = None,
    *,
    inputs: dict[str, Tensor],
    device: Device,
) -> Tensor:
    """The mean over labels, or beside a ``reference`` what follows from both models' log-probabilities."""
    alone = reference is None
    log_probs, *metrics = _scores(
        model, inputs, device, METRICS if alone else DPO_METRICS, labels_alone=alone
    )
    if alone:
        return -log_probs.sum() / inputs["labels"][:, 1:].numel()
    with torch.no_grad():
        compared, *_ = _scores(reference, inputs, device, METRICS[:1])
    return (compared - log_probs).sum()


def _scores(
    model: FlamingoForConditionalGeneration,
    inputs: dict[str, Tensor],
    device: Device,
    metrics: Sequence[str],
    labels_alone: bool = False,
) -> tuple[Tensor | None, ...]:
    """TRL's fused head (trl.trainer.utils.add_fused_lm_head); every position counts as one with a label."""
    masks = (
        {"attention_mask": inputs["attention_mask"]} if len(inputs["input_ids"]) > 1 else {}
    )  # alone: no padding
    with model.scoring_rows_apart():
        output = model.backbone(inputs["input_ids"], inputs.get("pixel_values"), use_cache=False, **masks)
        head = model.get_output_embeddings()
        weight, bias = head.weight, head.bias
    hidden, labels = output.last_hidden_state[:, :-1], inputs["labels"][:, 1:]
    return ChunkedLogProbFunction.apply(
        _given_to_the_head(hidden, device, labels_alone),
        weight,
        bias,
        labels.clamp(min=0).reshape(-1),
        1.0,
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        1.0,
        metrics,
    )


def _given_to_the_head(hidden: Tensor, device: Device, labels_alone: bool) -> Tensor:
    """Hidden states (B * T, D) of (B, T, D): given label positions alone, and on a GPU selected by TRL itself."""
    if labels_alone:
        hidden = _scored(hidden)[None]
    return _scored(hidden) if device == "cuda" else hidden.reshape(-1, hidden.shape[-1])


def _scored(hidden: Tensor) -> Tensor:
    """What ``hidden[mask]`` of an all-true mask gives: (B, T, D) -> (B * T, D), gathered."""
    rows, columns = (
        index.reshape(-1) for index in torch.meshgrid(*map(torch.arange, hidden.shape[:2]), indexing="ij")
    )
    return hidden[rows, columns]


@contextmanager
def _full_batch(models: Sequence[FlamingoForConditionalGeneration], batch: Batch) -> Iterator[None]:
    """Let the models take their media from full batches, in place of counting markers in ids that have no content."""
    for model in models:
        model.media_for = partial(_media, model, batch.answers)
    try:
        yield
    finally:
        for model in models:
            del model.media_for


def _media(
    model: FlamingoForConditionalGeneration,
    copies: int,
    input_ids: Tensor,
    given: MediaInput | None,
    cache: object | None = None,
    documents: Tensor | None = None,
) -> Media:
    """`encode_media` where every slot holds an image, each there ``copies`` times and run through the tower once."""
    if given is None:
        return no_media(model.perceiver, input_ids.new_zeros(len(input_ids)))
    samples, images = given.frames.shape[:2]
    rows = torch.arange(samples).repeat_interleave(images)
    slots = torch.arange(images).repeat(samples)
    frames = given.frames[rows, slots].flatten(0, 1)
    tokens = spatial_tokens(
        model.vision_encoder, frames if copies == 1 else frames[torch.arange(len(frames) // copies)]
    )
    tokens = (tokens if copies == 1 else tokens[torch.arange(len(tokens)).repeat(copies)]).unflatten(
        0, (-1, 1)
    )
    encoded = model.perceiver(tokens[None], slots[None])[0]
    latents = encoded.new_zeros(samples, images, *encoded.shape[1:])
    latents[rows, slots] = encoded
    return Media(latents, input_ids.new_full((samples,), images))


@contextmanager
def _offloaded(wanted: bool) -> Iterator[None]:
    """Saved activations leave the device and come back as new tensors, as under TRL's activation offloading."""
    with ExitStack() as stack:
        if wanted:
            stack.enter_context(saved_tensors_hooks(_Host(), _back))
        yield


class _Host:
    """Takes activations; the last few are still on the device."""

    def __init__(self) -> None:
        self.stash: list[Tensor] = []

    def __call__(self, saved: Tensor) -> Any:
        if isinstance(saved, torch.nn.Parameter) or saved.nbytes < SMALLEST_OFFLOADED:
            return saved
        self.stash = [*self.stash[1 - STASH :], saved.detach()]
        return saved.shape, saved.stride(), saved.dtype


def _back(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    shape, stride, dtype = kept
    return torch.empty_strided(shape, stride, dtype=dtype)


SMALLEST_8BIT, SMALLEST_PAGED, STATE_BLOCK = 4096, 100_000, 256  # elements


def optimizer_state(parameter: Tensor, optimizer: str, device: Device) -> tuple[list[Tensor], int]:
    """The state of one parameter as tensors on the device, and the bytes that are paged."""
    kept = _kept(parameter, optimizer)
    moments, scales = kept[:2], kept[2:]
    if optimizer.startswith("paged_") and device == "cuda" and parameter.numel() >= SMALLEST_PAGED:
        return scales, sum(moment.nbytes for moment in moments)
    return kept, 0


def _kept(parameter: Tensor, optimizer: str) -> list[Tensor]:
    """Two moments, then their scales."""
    if optimizer == "adamw":
        return [torch.empty_like(parameter) for _ in range(2)]
    if not optimizer.endswith("8bit") or parameter.numel() < SMALLEST_8BIT:
        return [torch.empty_like(parameter, dtype=torch.float32) for _ in range(2)]
    moments = [torch.empty_like(parameter, dtype=torch.uint8) for _ in range(2)]
    blocks = ceil(parameter.numel() / STATE_BLOCK)
    return moments + [parameter.new_empty(blocks, dtype=torch.float32) for _ in range(2)]
