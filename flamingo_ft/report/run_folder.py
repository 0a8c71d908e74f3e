"""A run on disk: its recipe, log, predictions and metrics; and the callback that writes log.jsonl."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import atomic
from flamingo_ft.adapters.trained_on import generate_options
from flamingo_ft.config import (
    LOG_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    Recipe,
    load_recipe,
    stage_folder_name,
)
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.probe import Probe, find_probe
from flamingo_ft.evaluation.results import load_predictions

REPORT_FILE = "report.html"
Entry = dict[str, Any]  # flat scalars; "step" is the optimizer step


@dataclass(frozen=True)
class RunFolder:
    """A run, in progress or finished.

    metrics: empty until it is finished. probe: of its recipe's tower, if there is one.
    """

    folder: Path
    recipe: Recipe
    entries: list[Entry]
    predictions: list[dict[str, Any]]
    metrics: dict[str, Any]
    probe: Probe | None = None

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """Read the run's files; all but the recipe may be missing.

        Raises UserError if no run has begun in the folder.
        """
        if not (folder / RECIPE_FILE).is_file():
            raise UserError(
                f"{folder}: not the folder of a run, {RECIPE_FILE} not found; use a run's output_dir"
            )
        metrics = folder / METRICS_FILE
        recipe = load_recipe(folder / RECIPE_FILE, require=())
        return cls(
            folder,
            recipe,
            read_log(folder) if (folder / LOG_FILE).is_file() else [],
            load_predictions(folder) if (folder / PREDICTIONS_FILE).is_file() else [],
            json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {},
            find_probe(folder, recipe),
        )

    @property
    def finished(self) -> bool:
        """Whether metrics.json, the last file of a run, is there."""
        return bool(self.metrics)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The ``eval`` record of metrics.json; empty without one."""
        return self.metrics.get("eval") or {}

    @property
    def training(self) -> dict[str, Any]:
        """The ``train`` record of metrics.json; empty without one."""
        return self.metrics.get("train") or {}

    @cached_property
    def step(self) -> int:
        """The last optimizer step in the log."""
        return max([entry["step"] for entry in self.entries], default=0)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = [run.train.max_steps for run in self.recipe.runs]
        assert None not in steps, "the recipe of a run has its epochs as steps"
        return sum(filter(None, steps))

    @property
    def stage_starts(self) -> dict[str, int]:
        """The steps of the stages before each stage that has begun, by its name; empty without stages."""
        starts, step, number = {}, 0, 0
        for entry in self.entries:
            if entry.get("stage", number) != number:
                number = entry["stage"]
                starts[self.recipe.stages[number - 1].name] = step
            step = entry["step"]
        return starts

    @property
    def stage_reports(self) -> dict[str, str]:
        """The page of each stage that has one, relative to this run's folder, by its name."""
        folders = [
            stage_folder_name(*named) for named in enumerate(stage.name for stage in self.recipe.stages)
        ]
        pages = {name: f"{name}/{REPORT_FILE}" for name in folders}
        return {name: page for name, page in pages.items() if (self.folder / page).is_file()}

    def last(self, key: str) -> float | None:
        """Return the newest value of a key in the log."""
        return next((entry[key] for entry in reversed(self.entries) if key in entry), None)

    @property
    def seconds(self) -> float | None:
        """Training time so far."""
        return self.training.get("seconds") or self.last("seconds")

    @property
    def seconds_left(self) -> float | None:
        """Estimated training time to the end, from the time per step so far."""
        if self.finished or not self.step or self.seconds is None:
            return None
        return self.seconds / self.step * (self.steps - self.step)

    @property
    def commands(self) -> dict[str, str]:
        """Commands to run next: purpose -> command line."""
        folder = shlex.quote(str(self.folder))
        if self.finished:
            commands = {
                "ask": f"flamingo-ft generate {folder} {generate_options(self.folder)}",
                "evaluate": f"flamingo-ft eval {folder} --data FILE",
            }
            may_conclude = self.probe is None and self.recipe.runs[-1].data.tiles is None
            if self.evaluation.get("advice") and may_conclude:
                commands["probe the tower"] = f"flamingo-ft check {folder}/{RECIPE_FILE} --probe"
        else:
            commands = {"resume": f"flamingo-ft train {folder}/{RECIPE_FILE} --resume"}
        if "tensorboard" in self.recipe.train.report_to:
            logs = folder if self.recipe.stages else f"{folder}/tensorboard"
            commands["curves"] = f"tensorboard --logdir {logs}"
        return commands


def check_run(folder: Path, name: str) -> None:
    """Raise UserError if a folder lacks a file that every run leaves."""
    if not (folder / name).is_file():
        raise UserError(
            f"{folder}: not the folder of a finished run, {name} not found; use a run's output_dir"
        )


# --- the log ---


class LogFile(TrainerCallback):
    """Append each log entry to the file. A resumed run first restores the entries up to its checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            write_log(self.folder, state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(_lines(state.log_history[-1:]))


def write_log(folder: Path, entries: Iterable[Entry]) -> None:
    """Replace the file with these entries."""
    atomic.write_text(folder / LOG_FILE, _lines(entries))


def read_log(folder: Path) -> list[Entry]:
    """Return all entries. A last line without a line break, left by a killed process, is ignored."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _lines(entries: Iterable[Entry]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
