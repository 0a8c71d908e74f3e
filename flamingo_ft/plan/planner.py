"""Plan the memory of a recipe: the bytes of each component, and the peak of a training step."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor

from flamingo_ft.adapters import check_start
from flamingo_ft.backbones.visual_tokens import image_shape
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.config.tables import BRIDGE_PARTS, LANGUAGE, VISION
from flamingo_ft.errors import UserError
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.build import backbone_files, text_limit
from flamingo_ft.model.parts import is_lora

from .compat import FAKE_TENSOR_LOG, FakeTensorMode
from .cuda_emulation import Device
from .longest_batch import Batch, longest_batch
from .meta_model import build_meta_model, meta_to_fake
from .simulated_step import StepMemory, optimizer_state, simulate_step

# Larger batches are extrapolated from two smaller ones: a simulation takes time for each chunk of positions.
MAX_POSITIONS = 65_536  # text tokens of all samples
MIN_SAMPLES = 16

COMPONENTS = (VISION, LANGUAGE, *BRIDGE_PARTS)


@dataclass(frozen=True)
class Component:
    """A part of the model, in bytes: frozen and trainable weights, gradients and optimizer state."""

    name: str
    frozen: int
    trainable_parameters: int  # a count
    trainable: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Plan:
    """The memory of a recipe's training step on a device, in bytes."""

    device: Device
    batch: Batch
    components: tuple[Component, ...]
    step: StepMemory

    @property
    def peak(self) -> int:
        """The most bytes of tensors that are alive at one time."""
        return self.step.peak

    @property
    def activations(self) -> int:
        """Activations and temporary copies at the peak: all but weights, optimizer state and gradients."""
        return self.peak - self.step.weights - self.step.optimizer - self.step.gradients_at_peak

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable values in all components."""
        return sum(component.trainable_parameters for component in self.components)


class Planner:
    """Plan variants of a recipe with the same backbones and data, whose files are read once.

    text_tokens, images: of each sample; by default those of the longest samples in the recipe's data.
    """

    def __init__(
        self, recipe: Recipe, device: Device, *, text_tokens: int | None = None, images: int | None = None
    ):
        self.recipe = recipe
        self.device: Device = device
        self._sizes = {"text_tokens": text_tokens, "images": images}
        check_start(recipe.model)
        self._files = backbone_files(recipe.model)

    def plan(self, recipe: Recipe) -> Plan:
        """Plan one training step of a recipe.

        A step of many samples is extrapolated from two smaller ones. Raises UserError for a model that needs
        the values of tensors, as many mixtures of experts do.
        """
        model, processor = self._build(recipe)
        batch = self._batch(recipe, model, processor)
        components = tuple(_components(model, recipe, self.device))
        largest = max(MIN_SAMPLES, MAX_POSITIONS // batch.text_tokens)
        if batch.samples <= largest:
            step = self._simulate(model, batch, recipe.train)
        else:
            half = self._simulate(model, replace(batch, samples=largest // 2), recipe.train)
            model, _ = self._build(recipe)
            whole = self._simulate(model, replace(batch, samples=largest), recipe.train)
            step = extrapolate(half, largest // 2, whole, largest, batch.samples)
        return Plan(self.device, batch, components, step)

    def _build(self, recipe: Recipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        files = copy.deepcopy(self._files)
        return build_meta_model(recipe, files.tower, files.language, files.tokenizer, self.device)

    def _simulate(
        self, model: FlamingoForConditionalGeneration, batch: Batch, train: TrainSection
    ) -> StepMemory:
        """Simulate a step.

        Raises UserError for a model that needs the values of tensors, as many mixtures of experts do.
        """
        try:
            with _fake_tensor_log_disabled(), FakeTensorMode():
                meta_to_fake(model)
                return simulate_step(model, batch, train, self.device)
        except RuntimeError as error:
            reraise_machine_error(error)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model.language.name: a step of {self.recipe.model.language.name} cannot be simulated "
                f"without its weights ({reason}); training does not need the plan"
            ) from error

    def _batch(
        self, recipe: Recipe, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor
    ) -> Batch:
        limit = text_limit(model.config, recipe.data.max_text_tokens)
        batch = longest_batch(recipe, processor, image_shape(model.vision_encoder), limit, self._sizes)
        self._sizes = {"text_tokens": batch.text_tokens, "images": batch.images}
        return batch


def plan_memory(
    recipe: Recipe, *, device: Device = "cuda", text_tokens: int | None = None, images: int | None = None
) -> Plan:
    """Plan ``recipe`` on ``device`` without downloading weights.

    Raises UserError for backbones that do not exist or do not fit together, for a batch of unknown size, and
    for a model that cannot run without weights.
    """
    return Planner(recipe, device, text_tokens=text_tokens, images=images).plan(recipe)


def extrapolate(
    first: StepMemory, samples: int, second: StepMemory, more_samples: int, to: int
) -> StepMemory:
    """Extrapolate a step to a batch of ``to`` samples from two smaller batches: activations grow linearly."""
    growth = (second.peak - first.peak) * (to - more_samples) // (more_samples - samples)
    return replace(second, peak=second.peak + growth)


@contextmanager
def _fake_tensor_log_disabled() -> Generator[None]:
    """Keep torch from logging a traceback of an error that is reported in one line."""
    before, FAKE_TENSOR_LOG.disabled = FAKE_TENSOR_LOG.disabled, True
    try:
        yield
    finally:
        FAKE_TENSOR_LOG.disabled = before


def _components(
    model: FlamingoForConditionalGeneration, recipe: Recipe, device: Device
) -> Iterator[Component]:
    """Yield the parts of the model, the LoRA on each, and the weights that a reference model copies."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))  # tied tensors once
    for part in COMPONENTS:
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(part.prefix)}
        lora = {key: own.pop(key) for key in [*own] if is_lora(key)}
        yield _component(part.short, own, recipe.train, device)
        if lora:
            yield _component(f"LoRA on {part.short}", lora, recipe.train, device)
    if recipe.train.has_reference:
        copied = sum(tensor.nbytes for tensor in tensors.values() if tensor.requires_grad)
        yield Component(
            "reference", frozen=copied, trainable_parameters=0, trainable=0, gradients=0, optimizer=0
        )


def _component(name: str, tensors: Mapping[str, Tensor], train: TrainSection, device: Device) -> Component:
    trained = {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}
    states = [
        tensor for named in trained.items() for tensor in optimizer_state(*named, train.optimizer, device)[0]
    ]
    size = sum(tensor.nbytes for tensor in trained.values())
    return Component(
        name,
        frozen=sum(tensor.nbytes for tensor in tensors.values()) - size,
        trainable_parameters=sum(tensor.numel() for tensor in trained.values()),
        trainable=size,
        gradients=0 if train.optimizer_in_backward else size,
        optimizer=sum(tensor.nbytes for tensor in states),
    )
