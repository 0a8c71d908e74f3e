"""The memory plan: what each component of a recipe takes, and the peak of a training step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo_ft.adapters import check_start
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.config.tables import BRIDGE_PARTS, LANGUAGE, VISION
from flamingo_ft.errors import UserError
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.backbone_files import backbone_files, text_limit
from flamingo_ft.model.parts import is_lora

from .cuda_emulation import Device
from .longest_batch import Batch, longest_batch
from .meta_model import build_meta_model, move_to_fake
from .simulated_step import StepMemory, optimizer_state, simulate_step

# A larger batch is extrapolated from two smaller ones: a dry run loops over the positions of a batch in chunks.
MOST_POSITIONS = 65_536  # text tokens of all samples
LEAST_SAMPLES = 16

COMPONENTS = (VISION, LANGUAGE, *BRIDGE_PARTS)


@dataclass(frozen=True)
class Component:
    """A part of the model: bytes that stay frozen, what trains, and what training it keeps on the device, in bytes."""

    name: str
    frozen: int
    trainable_parameters: int
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
        """The most bytes of tensors that are ever alive."""
        return self.step.peak

    @property
    def activations(self) -> int:
        """What is neither weight nor optimizer state nor gradient at the peak: activations and temporary copies."""
        return self.peak - self.step.weights - self.step.optimizer - self.step.gradients_at_peak

    @property
    def trainable_parameters(self) -> int:
        return sum(component.trainable_parameters for component in self.components)


class Planner:
    """Plans variants of a recipe that share its backbones and data; what is fetched and read of those is so once.

    text_tokens, images: of each sample; None is what the longest samples of the recipe's data have.
    """

    def __init__(
        self, recipe: Recipe, device: Device, *, text_tokens: int | None = None, images: int | None = None
    ):
        self.recipe = recipe
        self.device = device
        self._sizes = {"text_tokens": text_tokens, "images": images}
        check_start(recipe.model)
        self._files = backbone_files(recipe.model)

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of ``recipe``."""
        model, processor = self._build(recipe)
        batch = self._batch(recipe, model, processor)
        components = tuple(_components(model, recipe, self.device))
        largest = max(LEAST_SAMPLES, MOST_POSITIONS // batch.text_tokens)
        if batch.samples <= largest:
            return Plan(self.device, batch, components, self._step(model, batch, recipe.train))
        half = self._step(model, replace(batch, samples=largest // 2), recipe.train)
        whole = self._step(self._build(recipe)[0], replace(batch, samples=largest), recipe.train)
        return Plan(
            self.device, batch, components, extrapolate(half, largest // 2, whole, largest, batch.samples)
        )

    def _build(self, recipe: Recipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        files = copy.deepcopy(self._files)
        return build_meta_model(recipe, files.tower, files.language, files.tokenizer, self.device)

    def _step(self, model: FlamingoForConditionalGeneration, batch: Batch, train: TrainSection) -> StepMemory:
        """The dry run. UserError for a model whose operations need the values of tensors, as many mixtures of experts do."""
        try:
            with _without_torch_log(), FakeTensorMode():
                move_to_fake(model)
                return simulate_step(model, batch, train, self.device)
        except RuntimeError as error:
            reraise_machine_error(error)
            reason = str(error).strip().splitlines()
            raise UserError(
                f"model.language.name: a step of {self.recipe.model.language.name} cannot be simulated without its weights "
                f"({reason[0] if reason else type(error).__name__}); a run does not need the plan"
            ) from error

    def _batch(
        self, recipe: Recipe, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor
    ) -> Batch:
        limit = text_limit(model.config, recipe.data.max_text_tokens)
        batch = longest_batch(recipe, processor, model.vision_encoder.image_size, limit, self._sizes)
        self._sizes = {"text_tokens": batch.text_tokens, "images": batch.images}
        return batch


@contextmanager
def _without_torch_log() -> Iterator[None]:
    """Errors of the dry run are reported here, in a line; torch would log a traceback of each before."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def extrapolate(
    first: StepMemory, samples: int, second: StepMemory, more_samples: int, to: int
) -> StepMemory:
    """The step of a batch of ``to`` samples, from those of two smaller ones: every activation grows with the batch."""
    grown = (second.peak - first.peak) * (to - more_samples) // (more_samples - samples)
    return replace(second, peak=second.peak + grown)


def plan_memory(
    recipe: Recipe, *, device: Device = "cuda", text_tokens: int | None = None, images: int | None = None
) -> Plan:
    """The plan of ``recipe`` on ``device``; fetches no weights.

    Raises UserError for backbones that are not there or do not fit together, for a batch of unknown size,
    and for a model that cannot be run without weights.
    """
    return Planner(recipe, device, text_tokens=text_tokens, images=images).plan(recipe)


def _components(
    model: FlamingoForConditionalGeneration, recipe: Recipe, device: Device
) -> Iterable[Component]:
    """The parts of the model, and LoRA beside each; what dpo's reference has of its own."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))  # what is tied is there once
    for part in COMPONENTS:
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(part.prefix)}
        updates = {key: tensor for key, tensor in own.items() if is_lora(key)}
        yield _component(part.short, [own[key] for key in own.keys() - updates.keys()], recipe.train, device)
        if updates:
            yield _component(f"LoRA on {part.short}", updates.values(), recipe.train, device)
    if recipe.train.method == "dpo":
        kept = sum(tensor.nbytes for tensor in tensors.values() if tensor.requires_grad)
        yield Component(
            "reference", frozen=kept, trainable_parameters=0, trainable=0, gradients=0, optimizer=0
        )


def _component(name: str, tensors: Iterable[Tensor], wanted: TrainSection, device: Device) -> Component:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    states = [
        tensor for parameter in trained for tensor in optimizer_state(parameter, wanted.optimizer, device)[0]
    ]
    size = sum(tensor.nbytes for tensor in trained)
    return Component(
        name,
        frozen=sum(tensor.nbytes for tensor in frozen),
        trainable_parameters=sum(tensor.numel() for tensor in trained),
        trainable=size,
        gradients=0 if wanted.optimizer_in_backward else size,
        optimizer=sum(tensor.nbytes for tensor in states),
    )
