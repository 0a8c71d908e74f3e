"""Stages of a recipe: several runs one after the other, each of which starts from the one before it.

A stage gives only what differs from the recipe's common values. `merge_stages` writes the common values into
every stage, so that each has complete sections, and the last stage's sections into the recipe itself: what
evaluates, merges or describes the result reads an ordinary recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticKnownError

from flamingo_ft.config.data_section import DataSection
from flamingo_ft.config.model_section import LoraSection, TrainableSection
from flamingo_ft.config.section import LAX, Section
from flamingo_ft.config.train_section import EvalSection, TrainSection
from flamingo_ft.config.yaml_document import Location

STAGES = "stages"
STAGE_SECTIONS = ("trainable", "lora", "data", "train", "eval")
COMMON_TRAIN_KEYS = ("output_dir", "checkpoint_dir", "push_to_hub")
"""Keys of ``train`` that say where the whole run is stored."""
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PAIRS: tuple[tuple[Location, Location], ...] = (
    (("train", "max_steps"), ("train", "epochs")),
    (("train", "warmup_steps"), ("train", "warmup_ratio")),
)
ALTERNATIVES: dict[Location, Location] = {key: other for pair in _PAIRS for key, other in (pair, pair[::-1])}
"""Key -> the one that gives the same quantity in another unit; a recipe has at most one of the two."""


class StageSection(Section):
    """A stage of a run: its name, and the values that differ from the recipe's common ones."""

    name: str
    """Name of the stage, and of its folder in train.output_dir: 1-NAME, 2-NAME, ..."""
    trainable: TrainableSection
    """Values of trainable that differ in this stage."""
    lora: LoraSection
    """Values of lora that differ in this stage. A later stage trains the LoRA weights of an earlier one
    further, so it needs the same ranks and targets."""
    data: DataSection
    """Values of data that differ in this stage. A list replaces the whole common list."""
    train: TrainSection
    """Values of train that differ in this stage: length, learning rates, method, ... From the second stage
    on, the defaults are those for a trained bridge, as with model.init_from."""
    eval: EvalSection
    """Values of eval that differ in this stage. From the second stage on, eval.before is false by default:
    the model before this stage is that after the previous one, which was evaluated then."""


def _refuse_empty(stages: Any) -> Any:
    """Refuse an empty list in a recipe; the default, an empty tuple, is a recipe without stages."""
    if isinstance(stages, list) and not stages:
        raise PydanticKnownError("too_short", {"field_type": "List", "min_length": 1, "actual_length": 0})
    return stages


Stages = Annotated[tuple[StageSection, ...], LAX, BeforeValidator(_refuse_empty)]


# --- common values in every stage ---


def merge_stages(values: Any) -> Any:
    """Return a recipe's plain values with common and own values in every section of every stage.

    Output folders of stages are set; values of another type than expected are left to validation. Call this
    once: afterwards, the recipe's own sections are the last stage's.
    """
    stages = stages_of(values)
    if not stages:
        return values
    common = {section: values.get(section, {}) for section in STAGE_SECTIONS}
    init_from = values["model"].get("init_from") if isinstance(values.get("model"), dict) else None
    merged = [
        _merged_stage(common, stage, index, index > 0 or init_from is not None)
        if isinstance(stage, dict)
        else stage
        for index, stage in enumerate(stages)
    ]
    last = merged[-1] if isinstance(merged[-1], dict) else {}
    sections = {section: last[section] for section in STAGE_SECTIONS if section in last}
    if isinstance(sections.get("train"), dict):
        sections["train"] = _with_common_keys(sections["train"], common["train"])
    return {**values, **sections, STAGES: merged}


def stages_of(values: Any) -> Sequence[Any]:
    stages = values.get(STAGES) if isinstance(values, dict) else None
    return stages if isinstance(stages, (list, tuple)) else ()


def _merged_stage(
    common: Mapping[str, Any], stage: Mapping[str, Any], index: int, starts_trained: bool
) -> dict[str, Any]:
    merged = {**stage}
    for section in STAGE_SECTIONS:
        own = stage.get(section, {})
        merged[section] = _merge(_without_replaced(common[section], own, section), own)
    train, evaluation = merged["train"], merged["eval"]
    if isinstance(train, dict):
        train = _with_common_keys(train, common["train"])
        folder = stage_folder_name(index, stage.get("name"))
        for key in ("output_dir", "checkpoint_dir"):
            if isinstance(train.get(key), (str, Path)):
                train[key] = str(Path(train[key]) / folder)
        train.pop("push_to_hub", None)
        train = with_default_optimizer(train, starts_trained)
    if index > 0 and isinstance(evaluation, dict):
        evaluation = {"before": False, **evaluation}
    return {**merged, "train": train, "eval": evaluation}


def _merge(common: Any, own: Any) -> Any:
    """Merge mappings key by key; any other value of the stage replaces the common one."""
    if not (isinstance(common, dict) and isinstance(own, dict)):
        return own
    merged = {**common}
    for key, value in own.items():
        merged[key] = _merge(common[key], value) if key in common else value
    return merged


def _without_replaced(common: Any, own: Any, section: str) -> Any:
    """Return the common section without what the stage gives in another unit."""
    if not (isinstance(common, dict) and isinstance(own, dict)):
        return common
    replaced = {
        other[-1]
        for key, other in ALTERNATIVES.items()
        if key[0] == section and own.get(key[-1]) is not None and other[-1] not in own
    }
    return {key: value for key, value in common.items() if key not in replaced}


def _with_common_keys(train: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Return a stage's ``train`` with the common values of `COMMON_TRAIN_KEYS`."""
    kept = {key: value for key, value in train.items() if key not in COMMON_TRAIN_KEYS}
    shared = common if isinstance(common, dict) else {}
    return kept | {key: shared[key] for key in COMMON_TRAIN_KEYS if key in shared}


def with_default_optimizer(train: Mapping[str, Any], starts_trained: bool) -> dict[str, Any]:
    """Fill in AdamW for a bridge that is trained already and for sharded weights."""
    return {"optimizer": "adamw", **train} if starts_trained or train.get("fsdp") else {**train}


def stage_folder_name(index: int, name: Any) -> str:
    """Return the name of a stage's folder in the run's output directory: ``1-bridge``."""
    return f"{index + 1}-{name}"


def stage_differences(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of a recipe's complete plain values without what `merge_stages` restores."""
    sections = {section: values[section] for section in STAGE_SECTIONS}
    stages = []
    for stage in values[STAGES]:
        own = {**stage, "train": _with_common_keys(stage["train"], sections["train"])}
        differing = {name: _differences(common, own[name]) for name, common in sections.items()}
        stages.append({"name": stage["name"], **{name: keys for name, keys in differing.items() if keys}})
    return stages


def _differences(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    differing = {}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(common[key], dict):
            value = _differences(common[key], value)
            if value:
                differing[key] = value
        elif value != common[key]:
            differing[key] = value
    return differing


# --- overrides of the command line ---


def clear_stage_values(values: Any, location: Location, is_set: bool) -> None:
    """Remove, in place, the stages' own values at ``location``, so that a common value holds in every stage.

    is_set: whether the common value is not null, so that it also replaces the same quantity in another unit.
    """
    if not location or location[0] not in STAGE_SECTIONS:
        return
    for stage in stages_of(values):
        _remove(stage, location)
        if is_set and location in ALTERNATIVES:
            _remove(stage, ALTERNATIVES[location])


def _remove(values: Any, location: Location) -> None:
    *parents, last = location
    for step in parents:
        values = values.get(step) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(last, None)
