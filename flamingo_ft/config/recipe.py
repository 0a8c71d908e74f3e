"""The recipe: its sections, whose values are validated one by one and then together.

Cross-field validation finds combinations of values, each valid by itself, that cannot work together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from flamingo_ft.config.data_section import DataSection, DataSource
from flamingo_ft.config.method_checks import check_method
from flamingo_ft.config.model_section import (
    LoraSection,
    ModelSection,
    PerceiverSection,
    TrainableSection,
)
from flamingo_ft.config.section import Section
from flamingo_ft.config.stage_checks import check_stages
from flamingo_ft.config.stages import STAGE_SECTIONS, STAGES, Stages, with_default_optimizer
from flamingo_ft.config.tables import BRIDGE_PARTS, CROSS_ATTENTION, NEW_TOKENS, PERCEIVER, VISION
from flamingo_ft.config.train_section import EvalSection, TrainSection
from flamingo_ft.config.yaml_document import Location

# pydantic's type of the error whose context holds all cross-field validation errors
CROSS_FIELD = "cross_field"

Errors = Iterator[tuple[Location, str]]  # the location of a key, and what is wrong with its value


class Recipe(Section):
    """Recipe of a flamingo_ft training run."""

    model: ModelSection
    """Both backbones and the bridge between them."""
    trainable: TrainableSection = TrainableSection()
    """Parts of the bridge that are trained in full."""
    lora: LoraSection = LoraSection()
    """LoRA on the backbones or on parts of the bridge."""
    data: DataSection
    """Training and evaluation data."""
    train: TrainSection
    """Training: length, optimization, checkpoints, logging."""
    eval: EvalSection = EvalSection()
    """Evaluation on the held-out samples."""
    stages: Stages = ()
    """Stages that one run trains one after the other, each from where the one before it ended: the bridge
    first, for example, and then LoRA too. Each gives what differs from the values above, and is a run in a
    folder of its own in train.output_dir, which gets the adapter with what all of them trained. Without
    stages, the values above are those of a single one."""

    @property
    def runs(self) -> tuple[Recipe, ...]:
        """The recipe of each stage as that of an ordinary run; without stages, this one.

        Each but the first starts from the result of the stage before it.
        """
        if not self.stages:
            return (self,)
        starts = [self.model.init_from, *(stage.train.output_dir.absolute() for stage in self.stages[:-1])]
        return tuple(
            self.model_copy(
                update={
                    "model": self.model.model_copy(update={"init_from": start}),
                    **{name: getattr(stage, name) for name in STAGE_SECTIONS},
                    STAGES: (),
                }
            )
            for stage, start in zip(self.stages, starts, strict=True)
        )

    @model_validator(mode="before")
    @classmethod
    def _default_of_the_optimizer(cls, values: Any) -> Any:
        """Fill in AdamW for a bridge that is trained already and for sharded weights."""
        match values:
            case {"train": dict(train), "model": dict(model)}:
                is_trained = model.get("init_from") is not None
                return {**values, "train": with_default_optimizer(train, is_trained)}
        return values

    @model_serializer(mode="wrap")
    def _without_empty_stages(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = serialize(self)
        return values if self.stages else {key: values[key] for key in values if key != STAGES}

    @model_validator(mode="after")
    def _validate_cross_field(self) -> Recipe:
        errors = list(_stage_errors(self) if self.stages else _cross_field_errors(self))
        if errors:
            text = "; ".join(f"{'.'.join(map(str, location))}: {message}" for location, message in errors)
            raise PydanticCustomError(CROSS_FIELD, "{text}", {"errors": errors, "text": text})
        return self


def _stage_errors(recipe: Recipe) -> Errors:
    for index, run in enumerate(recipe.runs):
        for location, message in _cross_field_errors(run):
            yield (location if location[0] == "model" else (STAGES, index, *location)), message
    yield from check_stages(recipe.model, recipe.stages)


def _cross_field_errors(recipe: Recipe) -> Errors:
    model, trainable, lora, data, train = (
        recipe.model,
        recipe.trainable,
        recipe.lora,
        recipe.data,
        recipe.train,
    )
    yield from _check_parts(model, trainable, lora)
    yield from _check_data(data, lora)
    yield from _check_tile_tags(recipe)
    yield from _check_run_length(train, data)
    yield from _check_training(train, trainable)
    yield from _check_evaluation(recipe.eval, data)
    yield from _check_per_part_values(train, trainable, lora)
    yield from check_method(train, data, lora, recipe.eval)
    yield from _check_fsdp(train, model, data)


def _check_parts(model: ModelSection, trainable: TrainableSection, lora: LoraSection) -> Errors:
    """Check that something is trained, no part both in full and with LoRA, and the bridge's quantization.

    Only frozen parts of a loaded bridge can be quantized.
    """
    in_full = [part.name for part in BRIDGE_PARTS if getattr(trainable, part.name)]
    for part in lora.parts:
        if part in in_full:
            yield (
                ("lora", part),
                f"trainable.{part} is true too; train the part in full or through LoRA: "
                "set one to false or null",
            )
    if not (in_full or lora.parts):
        yield ("trainable",), "nothing would be trained; set one part to true, or configure lora for one"
    yield from _check_depth(model.perceiver, lora)
    if model.bridge_quantization == "none":
        return
    if model.init_from is None:
        yield (
            ("model", "bridge_quantization"),
            "a newly initialized bridge has to be trained, and only frozen parts are quantized; "
            "use none, or set model.init_from",
        )
    elif {part.name for part in BRIDGE_PARTS if part.takes_lora} <= {*in_full}:
        yield (
            ("model", "bridge_quantization"),
            "the whole bridge is trained in full, and only frozen parts are quantized; use none",
        )


def _check_depth(perceiver: PerceiverSection, lora: LoraSection) -> Errors:
    if perceiver.depth:
        return
    if perceiver.max_num_frames is not None:
        yield (
            ("model", "perceiver", "max_num_frames"),
            "has no effect with depth 0, which averages a video's frames; set it to null, or raise depth",
        )
    if PERCEIVER.name in lora.parts:
        yield (
            ("lora", PERCEIVER.name),
            "with model.perceiver.depth 0 there is no matrix to adapt; set it to null",
        )


def _check_data(data: DataSection, lora: LoraSection) -> Errors:
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _check_source(("data", split, index), source)
    if data.cache and data.augmentation:
        yield (
            ("data", "cache"),
            "augmentation changes each image every time, so its features cannot be cached; "
            "set one of them to null",
        )
    if data.cache and VISION.name in lora.parts:
        yield (
            ("data", "cache"),
            "lora.vision changes the tower, so its features cannot be cached; set one of them to null",
        )
    if data.packing and data.max_text_tokens is None:
        yield (
            ("data", "packing"),
            "packed rows need a fixed length; set data.max_text_tokens, or packing to false",
        )
    if data.packing and data.group_by_length:
        yield (
            ("data", "group_by_length"),
            "packed rows all have the same length; set group_by_length or packing to false",
        )
    if data.eval_fraction and any(source.streaming for source in data.train):
        yield (
            ("data", "eval_fraction"),
            "a fraction of a streamed source cannot be held out; use data.eval, or set streaming to false",
        )


def _check_tile_tags(recipe: Recipe) -> Errors:
    if recipe.data.tiles is None or recipe.data.tiles.tags != "text":
        return
    if recipe.model.perceiver.depth:
        yield (
            ("data", "tiles", "tags"),
            "a text tag attends to the tokens of its tile, which a perceiver would mix with those of others; "
            "set model.perceiver to null, or use learned",
        )
    if recipe.model.init_from is None and not getattr(recipe.trainable, NEW_TOKENS.name):
        yield (
            ("data", "tiles", "tags"),
            "the rows of text tags have to be trained; set trainable.new_tokens to true, or use learned",
        )


def _check_source(location: Location, source: DataSource) -> Errors:
    if (source.path is None) == (source.hub is None):
        is_missing = source.path is None
        got, other = (
            ("neither path nor hub", "") if is_missing else ("both path and hub", ", the other to null")
        )
        yield location, f"got {got}; set one of them{other}"
    for key in ("config", "data_files", "revision"):
        if source.hub is None and getattr(source, key) is not None:
            yield (*location, key), "only applies to hub, a dataset on the Hugging Face Hub; remove it"


def _check_run_length(train: TrainSection, data: DataSection) -> Errors:
    """Check that run length and warmup are each given in only one of their two units."""
    if train.max_steps is None and train.epochs is None:
        yield ("train", "max_steps"), "missing; add it, or train.epochs instead"
    if train.max_steps is not None and train.epochs is not None:
        yield (
            ("train", "epochs"),
            f"got {train.epochs:g} beside max_steps {train.max_steps}; remove one of them",
        )
    if train.epochs is not None and any(source.streaming for source in data.train):
        yield (
            ("train", "epochs"),
            "a streamed source has no known length; use train.max_steps, or set streaming to false",
        )
    if train.warmup_ratio is not None and train.warmup_steps:
        yield (
            ("train", "warmup_ratio"),
            f"got {train.warmup_ratio:g} beside warmup_steps {train.warmup_steps}; remove one of them",
        )


def _check_training(train: TrainSection, trainable: TrainableSection) -> Errors:
    if train.optimizer_in_backward and train.gradient_accumulation_steps > 1:
        yield (
            ("train", "optimizer_in_backward"),
            f"got gradient_accumulation_steps {train.gradient_accumulation_steps}, "
            "but the optimizer steps in every backward pass; "
            "use 1 and a larger batch_size, or set optimizer_in_backward to false",
        )
    if train.optimizer_in_backward and train.non_finite == "skip_step":
        yield (
            ("train", "non_finite"),
            "a step inside the backward pass cannot be skipped afterwards; "
            "use stop, or set optimizer_in_backward to false",
        )
    if train.precision == "fp16" and trainable.dtype == "bf16":
        yield (
            ("trainable", "dtype"),
            "got bf16 with train.precision fp16, which needs fp32 weights; use fp32, or train.precision bf16",
        )


def _check_evaluation(evaluation: EvalSection, data: DataSection) -> Errors:
    if evaluation.steps is None:
        if evaluation.keep == "best":
            yield ("eval", "keep"), "best needs evaluations during training; set eval.steps"
        if evaluation.patience is not None:
            yield ("eval", "patience"), "needs evaluations during training; set eval.steps"
        return
    if not (data.eval or data.eval_fraction):
        yield (
            ("eval", "steps"),
            "needs samples to evaluate on; set data.eval or data.eval_fraction, or eval.steps to null",
        )
    if evaluation.metric != "loss" and not evaluation.answers:
        yield (
            ("eval", "metric"),
            f"{evaluation.metric} needs generated answers; set eval.answers to true, or use loss",
        )


def _check_per_part_values(train: TrainSection, trainable: TrainableSection, lora: LoraSection) -> Errors:
    """Reject learning rates and weight decays of parts that are not trained: they have no effect."""
    trained = trainable.model_dump(exclude={"dtype"}) | {"lora": bool(lora.parts)}
    trained |= {"gates": trained[CROSS_ATTENTION.name], "loraplus_lr_ratio": trained["lora"]}
    for section in ("learning_rates", "weight_decays"):
        for part in getattr(train, section).model_dump(exclude_none=True):
            if not trained[part]:
                yield ("train", section, part), _why_unused(section, part, has_lora=part in lora.parts)


def _why_unused(section: str, part: str, has_lora: bool) -> str:
    if part in ("lora", "loraplus_lr_ratio"):
        return "has no effect, because no part has LoRA; remove it, or configure lora for a part"
    if has_lora:
        return f"has no effect, because the part is trained through LoRA; use train.{section}.lora"
    trained = CROSS_ATTENTION.name if part == "gates" else part
    return f"has no effect, because trainable.{trained} is false; remove it, or train the part"


def _check_fsdp(train: TrainSection, model: ModelSection, data: DataSection) -> Errors:
    if not train.fsdp:
        return
    if train.method == "grpo":
        yield (
            ("train", "fsdp"),
            "grpo samples answers, which a sharded model cannot; use method sft, or set fsdp to false",
        )
    elif train.method != "sft":
        yield (
            ("train", "fsdp"),
            f"{train.method}'s reference model shares the weights that would be sharded; "
            "use method sft, or set fsdp to false",
        )
    if train.optimizer != "adamw" or train.optimizer_in_backward:
        yield (
            ("train", "optimizer"),
            "sharded weights need adamw after the backward pass; "
            "use adamw without optimizer_in_backward, or set train.fsdp to false",
        )
    if data.cache:
        yield (
            ("data", "cache"),
            "the cached tower runs outside the sharded model; set cache to null, or train.fsdp to false",
        )
    quantization = (model.vision.quantization, model.language.quantization)
    if "int8" in quantization or model.bridge_quantization != "none":
        yield (
            ("train", "fsdp"),
            "8-bit matrices and a quantized bridge cannot be sharded; use nf4 or none, or set fsdp to false",
        )
