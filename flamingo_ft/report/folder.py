"""What a run's folder says of it: log.jsonl, predictions.jsonl, metrics.json and resolved_recipe.yaml."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flamingo_ft.config import METRICS_FILE, RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.results import PREDICTIONS_FILE, load_predictions

from .log_file import LOG_FILE, Entry, read_log


@dataclass(frozen=True)
class RunFolder:
    """A run on disk, under way or over. metrics is empty until it is finished."""

    folder: Path
    recipe: Recipe
    entries: list[Entry]
    predictions: list[dict[str, Any]]
    metrics: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """UserError where no run has begun in the folder; any other file may be missing."""
        if not (folder / RECIPE_FILE).is_file():
            raise UserError(
                f"{folder}: not the folder of a run, {RECIPE_FILE} not found; give a run's output_dir"
            )
        return cls(
            folder,
            load_recipe(folder / RECIPE_FILE, require=()),
            read_log(folder) if (folder / LOG_FILE).is_file() else [],
            load_predictions(folder) if (folder / PREDICTIONS_FILE).is_file() else [],
            _metrics(folder / METRICS_FILE),
        )

    @property
    def finished(self) -> bool:
        """Whether the last file of a run is there."""
        return bool(self.metrics)

    @cached_property
    def step(self) -> int:
        """The optimizer step that was heard of last."""
        return max([entry["step"] for entry in self.entries], default=0)

    @property
    def steps(self) -> int:
        """Optimizer steps that the recipe asks for."""
        return self.recipe.train.max_steps

    def last(self, key: str) -> float | None:
        """The newest value that the log has under a key."""
        return next((entry[key] for entry in reversed(self.entries) if key in entry), None)

    @property
    def seconds(self) -> float | None:
        """Of training so far."""
        return self.metrics.get("train", {}).get("seconds") or self.last("seconds")

    @property
    def seconds_left(self) -> float | None:
        """Of training, if it goes on as it went."""
        if self.finished or not self.step or self.seconds is None:
            return None
        return self.seconds / self.step * (self.steps - self.step)

    @property
    def commands(self) -> dict[str, str]:
        """What can be done next, and how."""
        folder = shlex.quote(str(self.folder))
        seen = {"curves": f"tensorboard --logdir {folder}/tensorboard"}
        watched = seen if "tensorboard" in self.recipe.train.report_to else {}
        if not self.finished:
            return {"go on after a stop": f"flamingo-ft train {folder}/{RECIPE_FILE} --resume"} | watched
        return {
            "ask": f"flamingo-ft generate {folder} --image FILE --prompt TEXT",
            "judge": f"flamingo-ft eval {folder} --data FILE",
        } | watched


def _metrics(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
