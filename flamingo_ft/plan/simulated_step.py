"""Simulate one training step on fake tensors and track its memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.adapters.trainable import frozen_copy
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import TrainSection
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.media import MediaInput, no_media
from flamingo_ft.model.parts import is_orthogonalized
from flamingo_ft.model.sight import Group, Media, Sight
from flamingo_ft.model.tiles import UNTILED

from .compat import LOGPROB_CHUNK_SIZE
from .cuda_emulation import Device, activation_offload, emulate_device, recompute_contexts
from .longest_batch import Batch
from .memory_tracker import CUDA_ALLOCATION_BLOCK, MemoryTracker
from .precision import autocast_dtype

SFT_METRICS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks of the fused output head
POLICY_METRICS = {  # what the other trainers ask of it, of the policy
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "kto": ("log_probs", "entropy", "mean_logits"),
    "grpo": ("log_probs", "entropy"),
}
REFERENCE_METRICS = ("log_probs",)

# bitsandbytes 0.50.2, optim/optimizer.py, in elements: the smallest parameters with 8-bit and with paged
# state, and how many elements of 8-bit state share a float32 scale.
MIN_8BIT, MIN_PAGED, STATE_BLOCK = 4096, 100_000, 256


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device during a step that is not the first.

    Attributes:
        weights, optimizer: alive throughout.
        paged: optimizer state that the driver may move to host RAM; not part of ``optimizer``.
        gradients: all gradients, at the end of the backward pass.
        peak: the most bytes alive at one time, ``gradients_at_peak`` of them gradients.
    """

    weights: int
    optimizer: int
    paged: int
    gradients: int
    peak: int
    gradients_at_peak: int


def simulate_step(
    model: FlamingoForConditionalGeneration, batch: Batch, config: TrainSection, device: Device
) -> StepMemory:
    """Run forward, loss and backward as the trainer does, in the FakeTensorMode of ``model``."""
    trained = trainable_parameters(model)
    if config.gradient_checkpointing:
        options = {"use_reentrant": False, "context_fn": partial(recompute_contexts, device)}
        model.activation_checkpointing_enable(options)
    models = [model, frozen_copy(model)] if config.has_reference else [model]
    model.train()
    with (
        MemoryTracker(_allocation_block(device)) as tracker,
        emulate_device(device),
        _full_batch(models, batch),
    ):
        weights = tracker.track(tensor for one in models for tensor in chain(one.parameters(), one.buffers()))
        states = [optimizer_state(*named, config.optimizer, device) for named in trained.items()]
        optimizer = tracker.current - weights
        gradients = _watch_gradients(trained.values(), tracker, dropped=config.optimizer_in_backward)
        tracker.reset_peak()
        _forward_and_backward(models, batch, config, device)
    return StepMemory(
        weights=weights,
        optimizer=optimizer,
        paged=sum(paged for _, paged in states),
        gradients=sum(gradients.values()),
        peak=tracker.peak,
        gradients_at_peak=tracker.gradients_at_peak,
    )


def optimizer_state(name: str, parameter: Tensor, optimizer: str, device: Device) -> tuple[list[Tensor], int]:
    """Return the optimizer state of a parameter from the second step on: tensors, and bytes that are paged.

    torch.optim.AdamW keeps two moments in the parameter's dtype, and Muon one; bitsandbytes keeps them in
    float32, or, 8-bit, as bytes with a float32 scale per block.
    """
    if optimizer == "muon":
        count = 1 if is_orthogonalized(name) else 2
        return [torch.empty_like(parameter) for _ in range(count)], 0
    moments, scales = _moments_and_scales(parameter, optimizer)
    if optimizer.startswith("paged_") and device == "cuda" and parameter.numel() >= MIN_PAGED:
        return scales, sum(moment.nbytes for moment in moments)
    return moments + scales, 0


def _moments_and_scales(parameter: Tensor, optimizer: str) -> tuple[list[Tensor], list[Tensor]]:
    if optimizer == "adamw":
        return [torch.empty_like(parameter) for _ in range(2)], []
    if not optimizer.endswith("8bit") or parameter.numel() < MIN_8BIT:
        return [torch.empty_like(parameter, dtype=torch.float32) for _ in range(2)], []
    moments = [torch.empty_like(parameter, dtype=torch.uint8) for _ in range(2)]
    blocks = ceil(parameter.numel() / STATE_BLOCK)
    return moments, [parameter.new_empty(blocks, dtype=torch.float32) for _ in range(2)]


def _forward_and_backward(
    models: Sequence[FlamingoForConditionalGeneration], batch: Batch, config: TrainSection, device: Device
) -> None:
    """Run the micro-batches of a step, whose inputs are all on the device, as in the trainer."""
    # On a CPU, the samples that the last batch was collated from are still in host RAM.
    samples = batch.media() if device == "cpu" else None
    steps = config.gradient_accumulation_steps
    batches = [batch.tensors() for _ in range(min(steps, 2))]  # the peak is reached in the second or before
    waiting = _waiting_batches(batches[0], steps - len(batches), _allocation_block(device))
    dtype = autocast_dtype(config.precision, device)
    for inputs in batches:
        with activation_offload() if config.activation_offload and device == "cuda" else nullcontext():
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = _loss(models, inputs, config, device)
            loss.backward()
        del loss
    del samples, waiting


def _waiting_batches(inputs: dict[str, Tensor], count: int, block: int) -> list[Tensor]:
    """Allocate the memory of ``count`` more batches, every tensor rounded up to ``block`` bytes."""
    sizes = [-(-tensor.nbytes // block) * block for tensor in inputs.values()]
    return [torch.zeros(count, size, dtype=torch.uint8) for size in sizes] if count else []


def _watch_gradients(trained: Iterable[Tensor], tracker: MemoryTracker, dropped: bool) -> dict[int, int]:
    """Return a dictionary that the backward pass fills with the bytes of each parameter's gradient.

    dropped: gradients are released as they arrive, because the optimizer steps inside the backward pass.
    """
    sizes: dict[int, int] = {}

    def on_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if dropped:
            parameter.grad = None
        elif id(parameter) not in sizes:
            sizes[id(parameter)] = parameter.grad.nbytes
            tracker.gradients += parameter.grad.nbytes

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(on_gradient)
    return sizes


def _loss(
    models: Sequence[FlamingoForConditionalGeneration],
    inputs: dict[str, Tensor],
    config: TrainSection,
    device: Device,
) -> Tensor:
    """Return a loss of the method's passes in their order. models: the policy, and the reference if any."""
    policy, *references = models
    if config.method == "sft":
        log_probs, *_metrics = _log_probs(policy, inputs, device, SFT_METRICS)
        return -log_probs.sum() / inputs["labels"][:, 1:].numel()
    compared: list[Tensor] = []
    if config.method == "grpo":
        _sample_answers(policy, inputs)
        compared += [_without_gradient(one, inputs, device) for one in references]
    if config.method == "kto":  # on prompts with the answers of other rows
        compared.append(_without_gradient(policy, inputs, device))
    # The metrics are bound to a name because TRL keeps them alive until the loss is computed.
    log_probs, *_metrics = _log_probs(policy, inputs, device, POLICY_METRICS[config.method])
    if config.method != "grpo":
        passes = 2 if config.method == "kto" else 1
        compared += [_without_gradient(one, inputs, device) for one in references * passes]
    return sum((one - log_probs for one in compared), -log_probs).sum()


@torch.no_grad()
def _sample_answers(model: FlamingoForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    """Fill the key/value cache as generation does, with all tokens in one pass, and release it."""
    media = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    model.backbone(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=True, **media)


@torch.no_grad()
def _without_gradient(
    model: FlamingoForConditionalGeneration, inputs: dict[str, Tensor], device: Device
) -> Tensor:
    log_probs, *_ = _log_probs(model, inputs, device, REFERENCE_METRICS)
    return log_probs


def _log_probs(
    model: FlamingoForConditionalGeneration,
    inputs: dict[str, Tensor],
    device: Device,
    metrics: Sequence[str],
) -> tuple[Tensor, ...]:
    """Run the backbone and TRL's fused output head (trl.trainer.utils.add_fused_lm_head).

    Every position has a label.
    """
    # The trainer passes no mask with a single row, which has no padding.
    mask = {"attention_mask": inputs["attention_mask"]} if len(inputs["input_ids"]) > 1 else {}
    with model.scoring_rows_apart():
        output = model.backbone(inputs["input_ids"], inputs.get("pixel_values"), use_cache=False, **mask)
        head = model.get_output_embeddings()
        weight, bias = head.weight, head.bias
    hidden, labels = output.last_hidden_state[:, :-1], inputs["labels"][:, 1:]
    temperature = logit_scale = 1.0
    return ChunkedLogProbFunction.apply(
        _head_inputs(hidden, device),
        weight,
        bias,
        labels.clamp(min=0).reshape(-1),
        temperature,
        LOGPROB_CHUNK_SIZE,
        getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        logit_scale,
        metrics,
    )


def _head_inputs(hidden: Tensor, device: Device) -> Tensor:
    """Flatten hidden states (B, T, D) to (B * T, D), copied as the selection of label positions does.

    This package selects them before the head; on a GPU, TRL selects them once more.
    """
    hidden = _select_all(hidden)[None]
    return _select_all(hidden) if device == "cuda" else hidden.reshape(-1, hidden.shape[-1])


def _select_all(hidden: Tensor) -> Tensor:
    """Return ``hidden[mask]`` for a mask that is true everywhere: (B, T, D) -> (B * T, D), a copy."""
    batch, text = (torch.arange(size) for size in hidden.shape[:2])
    rows, columns = (index.reshape(-1) for index in torch.meshgrid(batch, text, indexing="ij"))
    return hidden[rows, columns]


@contextmanager
def _full_batch(models: Sequence[FlamingoForConditionalGeneration], batch: Batch) -> Generator[None]:
    """Give the models media in every slot, instead of counting image tokens in ids that have no content."""
    for model in models:
        model.media_for = partial(_encode_full_media, model, batch.answers)
    try:
        yield
    finally:
        for model in models:
            del model.media_for


def _encode_full_media(
    model: FlamingoForConditionalGeneration,
    copies: int,
    input_ids: Tensor,
    media: MediaInput | None,
    cache: object | None = None,
    documents: Tensor | None = None,
) -> Media:
    """`encode_media` with an image in every slot.

    copies: how often each image occurs in the batch (twice in preference pairs); the tower encodes it once.
    """
    if media is None:
        return no_media(model.perceiver, input_ids.new_zeros(len(input_ids)))
    samples, images = media.frames.shape[:2]
    rows = torch.arange(samples).repeat_interleave(images)
    slots = torch.arange(images).repeat(samples)
    frames = media.frames[rows, slots].flatten(0, 1)
    if copies == 1:
        tokens = spatial_tokens(model.vision_encoder, frames)
    else:
        tokens = spatial_tokens(model.vision_encoder, frames[torch.arange(len(frames) // copies)])
        tokens = tokens[torch.arange(len(tokens)).repeat(copies)]
    views = media.frames.shape[2]
    tokens = tokens.unflatten(0, (-1, views))
    grid = UNTILED if views == 1 else (1, max(2, views - 1))  # any grid gives as many latents
    encoded = model.perceiver(tokens[None], slots[None], grid)[0]
    latents = encoded.new_zeros(samples, images, *encoded.shape[1:])
    latents[rows, slots] = encoded
    return _FullMedia(latents, input_ids.new_full((samples,), images))


class _FullMedia(Media):
    """Media of which equally many tokens see each: which they are, ids without content cannot tell."""

    def sight(self, times: Tensor, *_: Any, tags: Tensor | None = None, **__: Any) -> Sight:
        """Return what each token sees."""
        assert self.latents is not None
        seen = times.new_ones(*times.shape, self.latents.shape[1], dtype=torch.bool)
        return _FullSight(self, seen, tags, one_medium=True)


class _FullSight(Sight):
    """The sight of `_FullMedia`."""

    @property
    def tokens(self) -> Tensor:
        """An equal share of the tokens for each medium."""
        rows, tokens, media = self.seen.shape
        return torch.arange(rows * media * max(1, tokens // media))

    def unmasked_groups(self) -> Iterator[Group]:
        """Yield one group, of all media."""
        yield Group(self.tokens, slice(None), self.seen[:, 0].numel())


def _allocation_block(device: Device) -> int:
    return CUDA_ALLOCATION_BLOCK if device == "cuda" else 1
