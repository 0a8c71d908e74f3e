"""Errors in the stages of a recipe: which stage they are in, and where in the file the value is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flamingo_ft.config.paths import value_at
from flamingo_ft.config.stages import COMMON_TRAIN_KEYS, STAGE_SECTIONS, STAGES, stages_of
from flamingo_ft.config.yaml_document import Location, dotted
from flamingo_ft.formatting import one_line


def location_text(location: Location, values: Any) -> str:
    """Return a location as users write it, in a stage with its name: `stages.1 (lora): train.max_steps`."""
    name = value_at(values, (*location[:2], "name")) if len(location) > 1 and location[0] == STAGES else None
    if not isinstance(name, str):
        return dotted(location)
    stage = f"{dotted(location[:2])} ({one_line(name)})"
    return f"{stage}: {dotted(location[2:])}" if len(location) > 2 else stage


def at_written_locations(errors: Sequence[tuple[Location, str]], written: Any) -> list[tuple[Location, str]]:
    """Return errors of single merged values once each, at their locations in the recipe as it is written.

    A common value that is invalid is so in every stage that does not replace it.
    """
    if not stages_of(written):
        return [*errors]
    placed: dict[tuple[Location, str], None] = {}
    for location, message in errors:
        if location[:1] and location[0] in STAGE_SECTIONS:
            continue  # those of the last stage, which are in the stages too
        inherited = location[2:] if location[:1] == (STAGES,) else ()
        if inherited and not _has_value(written, location) and _has_value(written, inherited):
            location = inherited
        placed[location, message] = None
    return list(placed)


def _has_value(values: Any, location: Location) -> bool:
    parent, last = value_at(values, location[:-1]), location[-1]
    if isinstance(parent, list):
        return isinstance(last, int) and last < len(parent)
    return isinstance(parent, dict) and last in parent


def misplaced_keys(values: Any) -> Iterator[tuple[Location, str]]:
    """Yield location and message of each key, in stages as they are written, that must be common to all."""
    for index, stage in enumerate(stages_of(values)):
        stage = stage if isinstance(stage, dict) else {}
        for key in ("model", "init_from"):
            if key in stage:
                yield (
                    (STAGES, index, key),
                    "cannot vary: all stages train the same model, each from where the one before it ended; "
                    "set model once for the whole recipe",
                )
        train = stage.get("train")
        for key in COMMON_TRAIN_KEYS:
            if isinstance(train, dict) and key in train:
                yield (
                    (STAGES, index, "train", key),
                    "cannot vary: it holds for the whole run, in which every stage has its own folder; "
                    f"set train.{key} once for the whole recipe",
                )
