"""The common look of all figures. They are drawn without pyplot, which would keep global state."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flamingo_ft.errors import UserError

INK = "#24292f"
BLUE, GREEN, RED, ORANGE, VIOLET, TEAL = "#1f5fa8", "#1a7f37", "#c0272d", "#b35900", "#6f42c1", "#0b7a75"
FIGURE_SIZE = (7.0, 3.0)  # inches
FONT_SIZES = {"title": 12, "label": 10, "tick": 9}  # points


def new_axes(title: str, ylabel: str, xlabel: str = "optimizer step") -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = new_figure()
    axes = figure.subplots()
    style_axes(axes, title, ylabel, xlabel)
    return figure, axes


def new_figure() -> Figure:
    """Return an empty figure of the common size."""
    return Figure(figsize=FIGURE_SIZE, layout="constrained", facecolor="white")


def style_axes(axes: Axes, title: str, ylabel: str, xlabel: str = "optimizer step") -> None:
    """Set title and labels, and give axes the common look."""
    axes.set_title(title, loc="left", color=INK, fontsize=FONT_SIZES["title"])
    axes.set_xlabel(xlabel, fontsize=FONT_SIZES["label"], color=INK)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZES["label"], color=INK)
    axes.tick_params(labelsize=FONT_SIZES["tick"], colors=INK)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def check_run(run: Path, name: str) -> None:
    """Raise UserError if a folder lacks a file that every run leaves."""
    if not (run / name).is_file():
        raise UserError(f"{run}: not the folder of a finished run, {name} not found; give a run's output_dir")
