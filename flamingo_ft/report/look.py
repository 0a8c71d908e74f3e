"""How all figures look: matplotlib, outside pyplot's global state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flamingo_ft.errors import UserError

INK, SOFT = "#24292f", "#59636e"
BLUE, GREEN, RED, ORANGE, VIOLET, TEAL = "#1f5fa8", "#1a7f37", "#c0272d", "#b35900", "#6f42c1", "#0b7a75"
SIZE = (7.0, 3.0)  # inches
POINTS = {"title": 12, "label": 10, "tick": 9}


def new_axes(title: str, ylabel: str, xlabel: str = "optimizer step") -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    axes = figure.subplots()
    dress(axes, title, ylabel, xlabel)
    return figure, axes


def dress(axes: Axes, title: str, ylabel: str, xlabel: str = "optimizer step") -> None:
    """Give axes the look of all others."""
    axes.set_title(title, loc="left", color=INK, fontsize=POINTS["title"])
    axes.set_xlabel(xlabel, fontsize=POINTS["label"], color=INK)
    axes.set_ylabel(ylabel, fontsize=POINTS["label"], color=INK)
    axes.tick_params(labelsize=POINTS["tick"], colors=INK)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def check_run(run: Path, name: str) -> None:
    """UserError where a folder lacks a file that a run leaves."""
    if not (run / name).is_file():
        raise UserError(f"{run}: not the folder of a finished run, {name} not found; give a run's output_dir")
