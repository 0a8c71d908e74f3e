"""The start of a notebook: where its runs are kept, and its recipe files.

With SMOKE=1 in the environment, a notebook is only tried, offline on a CPU in a minute: its recipes are
replaced by their trials of a few steps, with small stand-ins for what they would fetch
(`flamingo_ft.training.trial`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from flamingo_ft import atomic
from flamingo_ft.config import Recipe, dump_recipe, load_recipe
from flamingo_ft.training.trial import Trial

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
COLUMNS, LINES = 110, 40  # the size that commands take a cell for
SAVE_STEPS = 50  # between two checkpoints
SMOKE_STEPS = 6  # enough for curves


def is_smoke() -> bool:
    """Return whether this is a test of the notebook."""
    return os.environ.get("SMOKE") == "1"


def start_notebook(notebook: str) -> Path:
    """Let commands and loading print lines instead of progress bars, and return the folder of the runs.

    A cell with a command shows each state of a bar as a new line.
    """
    os.environ |= {"TERM": "dumb", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    disable_progress_bar()
    return _runs_folder(notebook)


def _runs_folder(notebook: str) -> Path:
    """Return the folder of a notebook's runs, and create it.

    On Colab it is on Google Drive, which outlives the machine: Colab asks for permission to mount it.
    Elsewhere it is in the current directory, in a test a temporary one.
    """
    if is_smoke():
        return Path(tempfile.mkdtemp(prefix=f"{notebook}_"))
    if "google.colab" in sys.modules:
        from google.colab import drive  # pyrefly: ignore[missing-import]

        drive.mount(str(DRIVE))
        folder = DRIVE / "MyDrive" / "flamingo_ft" / notebook
    else:
        folder = Path("runs", notebook)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_recipe(file: Path, recipe: str | Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a recipe with values of your own to ``file``, whose run is kept beside it, and return ``file``.

    recipe: the name of a packaged recipe, or a file. changes: key -> value, such as ``{"train.max_steps":
    100}``; paths are relative to the current directory. By default checkpoints are frequent, because a
    notebook's machine may be lost at any time, and no worker processes load the data. In a test the file
    holds the recipe's trial. Raises UserError as `load_recipe` does.
    """
    folder = file.with_suffix("")
    # A kernel has threads of its own, and a process forked from one may wait forever for a lock.
    defaults = {"train.output_dir": folder, "train.save_steps": SAVE_STEPS, "train.num_workers": 0}
    values = {**defaults, **(changes or {})}
    settings = load_recipe(
        recipe, [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    )
    if is_smoke():
        settings = _trial(settings, folder)
    atomic.write_text(file, dump_recipe(settings))
    return file


def _trial(recipe: Recipe, folder: Path) -> Recipe:
    """Return the trial of a recipe with a log entry for each of a few steps, and print what it leaves out."""
    trial = Trial(recipe, folder)
    samples = trial.recipe.eval.max_samples
    print(f"SMOKE=1: {SMOKE_STEPS} steps and {samples} held-out samples per source, which show no skill")
    for line in trial.stand_ins:
        print(line)
    changes = {"max_steps": SMOKE_STEPS, "logging_steps": 1}
    train = trial.recipe.train.model_copy(update=changes)
    return trial.recipe.model_copy(update={"train": train})
