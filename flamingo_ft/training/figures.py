"""Pictures of a finished run."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from flamingo_ft.evaluation.accuracy import normalise
from flamingo_ft.evaluation.results import AFTER, load_predictions

from .run import LOG_FILE


def loss_curve(run: str | Path) -> Figure:
    """Training loss (nats per label token) over optimizer steps."""
    lines = (Path(run) / LOG_FILE).read_text(encoding="utf-8").splitlines()
    logged = [entry for entry in map(json.loads, lines) if "loss" in entry]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in logged], [entry["loss"] for entry in logged])
    axes.set(xlabel="optimizer step", ylabel="loss (nats per label token)", ylim=(0, None), title="Training loss")
    axes.grid(alpha=0.3)
    return figure


def answer_grid(run: str | Path, rows: int = 3, columns: int = 4) -> Figure:
    """Held-out questions spread over all tasks: their images, and the answers before and after training."""
    shown = _spread(load_predictions(Path(run)), rows * columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), layout="constrained")
    for axes, prediction in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        axes.imshow(_side_by_side(prediction["images"]), cmap="gray")
        axes.set_title(_caption(prediction), fontsize=9, color=_colour(prediction))
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def _spread(predictions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Every task in turn, each from its first question on."""
    by_task: dict[str, list] = {}
    for prediction in predictions:
        by_task.setdefault(prediction["task"], []).append(prediction)
    turns = [p for position in range(count) for task in by_task.values() for p in task[position : position + 1]]
    return turns[:count]


def _side_by_side(paths: list[str]) -> Image.Image:
    images = [Image.open(path).convert("RGB") for path in paths]
    height, gap = max(image.height for image in images), max(1, images[0].width // 8)
    canvas = Image.new("RGB", (sum(image.width for image in images) + gap * (len(images) - 1), height), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap
    return canvas


def _caption(prediction: dict[str, Any]) -> str:
    question = textwrap.fill(prediction["question"], 34)
    before = [f"before: {prediction['before']}"] if "before" in prediction else []
    return "\n".join([question, *before, f"after: {prediction[AFTER]}"])


def _colour(prediction: dict[str, Any]) -> str:
    right = normalise(prediction[AFTER]) == normalise(prediction["answer"])
    return "darkgreen" if right else "firebrick"
