"""What the notebooks share: where their runs are kept, their recipe files, and a small example data set.

With SMOKE=1 in the environment, a notebook runs offline on a CPU in a minute: its recipes are replaced by
their trials, with small stand-ins for what they would fetch (`flamingo_ft.training.trial`).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from flamingo_ft import atomic
from flamingo_ft.config import Recipe, dump_recipe, load_recipe
from flamingo_ft.config.library import library_folder
from flamingo_ft.data import Sample, read_samples
from flamingo_ft.training.trial import Trial

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
COLUMNS = 110  # of what commands print
SMOKE_STEPS = 6  # enough for curves
IMAGES, TABLE, DIALOGUES = "images", "questions.csv", "dialogues.json"  # of the example data


def is_smoke() -> bool:
    """Return whether this is a test of the notebook."""
    return os.environ.get("SMOKE") == "1"


def start_notebook(notebook: str) -> Path:
    """Let commands and loading print lines instead of progress bars, and return the folder of the runs.

    A cell with a command shows each state of a bar as a new line.
    """
    os.environ |= {"TERM": "dumb", "COLUMNS": str(COLUMNS)}
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
    100}``; paths are relative to the current directory. In a test the file holds the recipe's trial. Raises
    UserError as `load_recipe` does.
    """
    folder = file.with_suffix("")
    values = {"train.output_dir": folder, **(changes or {})}
    settings = load_recipe(
        recipe, [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    )
    if is_smoke():
        settings = _trial(settings, folder)
    atomic.write_text(file, dump_recipe(settings))
    return file


def _trial(recipe: Recipe, folder: Path) -> Recipe:
    """Return the trial of a recipe with a log entry for each of a few steps, and print its stand-ins."""
    trial = Trial(recipe, folder)
    for line in trial.stand_ins:
        print(line)
    changes = {"max_steps": SMOKE_STEPS, "logging_steps": 1}
    train = trial.recipe.train.model_copy(update=changes)
    return trial.recipe.model_copy(update={"train": train})


def write_example_data(folder: Path, rows: int = 200) -> Path:
    """Write a small data set in two common forms, as an example of your own, and return ``folder``.

    ``images`` holds drawings of the packaged emoji data. ``questions.csv``, with the columns image, question
    and answer, and ``dialogues.json``, in LLaVA's form, are about ``rows`` of them each.
    """
    samples = read_samples(library_folder() / "emoji" / "train.jsonl")
    named = [sample for sample in samples if sample.task == "name"][: 2 * rows]
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    table = [_example_row(sample, folder / IMAGES) for sample in named]
    table, dialogues = table[:rows], table[rows:]
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "question", "answer"])
        writer.writeheader()
        writer.writerows(table)
    atomic.write_text(folder / DIALOGUES, json.dumps([_llava_row(row) for row in dialogues], indent=1))
    return folder


def _example_row(sample: Sample, images: Path) -> dict[str, str]:
    """Copy the image of a sample, and return its row of the table."""
    (image,) = sample.images
    source = Path(str(image))
    name = f"{source.parent.name}_{source.name}"
    shutil.copyfile(source, images / name)
    answer = sample.messages[-1]["content"][0]["text"]
    return {"image": name, "question": "What is this?", "answer": answer}


def _llava_row(row: dict[str, str]) -> dict[str, object]:
    turns = [("human", f"<image>\n{row['question']}"), ("gpt", row["answer"])]
    return {"image": row["image"], "conversations": [{"from": who, "value": text} for who, text in turns]}
