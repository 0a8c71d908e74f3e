"""Checks of the stages of a recipe together: names, and what later stages take over from earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from flamingo_ft.config.data_section import TilesSection
from flamingo_ft.config.model_section import LoraSection, ModelSection
from flamingo_ft.config.stages import FOLDER_NAME, STAGES, StageSection
from flamingo_ft.config.tables import BRIDGE_PARTS, PERCEIVER
from flamingo_ft.config.yaml_document import Location, yaml_line

Errors = Iterator[tuple[Location, str]]


def check_stages(model: ModelSection, stages: Sequence[StageSection]) -> Errors:
    """Yield location and message of each error that no stage has by itself."""
    yield from _check_names(stages)
    yield from _check_lora(stages)
    yield from _check_bridge_quantization(model, stages)
    yield from _check_tiles(stages)
    yield from _check_eval_fraction(stages)


def _check_names(stages: Sequence[StageSection]) -> Errors:
    names = [stage.name for stage in stages]
    for index, name in enumerate(names):
        if not FOLDER_NAME.fullmatch(name):
            yield (
                (STAGES, index, "name"),
                f"must be the name of a folder, of letters, digits, '.', '_' and '-', got {name!r}",
            )
        elif name in names[:index]:
            yield (STAGES, index, "name"), f"stages.{names.index(name)} has the same name; use another"


def _check_lora(stages: Sequence[StageSection]) -> Errors:
    """Check that LoRA weights can be trained further: a run that starts from LoRA needs LoRA of its shape."""
    first = next((index for index, stage in enumerate(stages) if stage.lora.parts), len(stages))
    for index in range(first + 1, len(stages)):
        if _lora_shape(stages[index].lora) != _lora_shape(stages[first].lora):
            yield (
                (STAGES, index, "lora"),
                f"differs from that of stages.{first} ({stages[first].name}), whose LoRA weights are trained "
                "further; use the same parts, ranks, targets, use_dora and use_rslora",
            )
    if first + 1 < len(stages) and stages[first].lora.init_lora_weights == "pissa":
        yield (
            (STAGES, first, "lora", "init_lora_weights"),
            "pissa is stored as LoRA of twice the rank, which a later stage cannot train further; "
            "use another initialization, or pissa in the last stage alone",
        )


def _lora_shape(lora: LoraSection) -> object:
    return lora.parts, lora.use_dora, lora.use_rslora


def _check_bridge_quantization(model: ModelSection, stages: Sequence[StageSection]) -> Errors:
    """Check that no stage quantizes what an earlier one trained: the final adapter holds it unquantized."""
    if model.bridge_quantization == "none":
        return
    for part in BRIDGE_PARTS:
        trained = [getattr(stage.trainable, part.name) for stage in stages]
        if part.takes_lora and True in trained and False in trained[trained.index(True) :]:
            yield (
                ("model", "bridge_quantization"),
                f"would quantize the {part.label} in a stage after one that trains it; "
                f"use none, or set trainable.{part.name} alike in all later stages",
            )


def _check_tiles(stages: Sequence[StageSection]) -> Errors:
    """Check that each stage has the tiles of the one before it, if that has any."""
    for index, (earlier, stage) in enumerate(pairwise(stages), start=1):
        before, now, location = earlier.data.tiles, stage.data.tiles, (STAGES, index, "data", "tiles")
        if not _can_follow(before, now):
            yield (
                location,
                f"got {_tiles_text(now)}, but stages.{index - 1} ({earlier.name}), whose bridge is trained "
                f"further, has {_tiles_text(before)}; use the same in both",
            )
            continue
        adds_places = _tags(now) == "learned" and _tags(before) != "learned"
        if adds_places and not getattr(stage.trainable, PERCEIVER.name):
            yield (
                location,
                f"stages.{index - 1} ({earlier.name}) learns no places of tiles, and this stage cannot with "
                "trainable.perceiver false; set it to true, or data.tiles.tags to none",
            )


def _can_follow(before: TilesSection | None, now: TilesSection | None) -> bool:
    """Return whether a bridge that was trained with the tiles ``before`` can be trained with those of now.

    Learned tags can be added, because their embeddings start at zero.
    """
    if before is None:
        return _tags(now) != "text"
    return now == before or (before.tags == "none" and now == before.model_copy(update={"tags": "learned"}))


def _tags(tiles: TilesSection | None) -> str:
    return "none" if tiles is None else tiles.tags


def _tiles_text(tiles: TilesSection | None) -> str:
    """Return tiles as a recipe has them: `{max: 4, size: auto, thumbnail: true, tags: learned}`."""
    return "null" if tiles is None else yaml_line({**tiles.model_dump(), "size": tiles.size or "auto"})


def _check_eval_fraction(stages: Sequence[StageSection]) -> Errors:
    """Check that all stages hold out the same rows if any holds out a fraction: another may train on them."""
    splits = [(stage.data.eval_fraction, stage.data.train, stage.train.seed) for stage in stages]
    if not any(fraction for fraction, _, _ in splits):
        return
    for index, split in enumerate(splits):
        if split != splits[0]:
            yield (
                (STAGES, index, "data", "eval_fraction"),
                f"holds out different rows from stages.0 ({stages[0].name}), so one of the two may train on "
                "rows that the other holds out; name held-out rows with data.eval in all stages, or use the "
                "same data.train, fraction and seed",
            )
