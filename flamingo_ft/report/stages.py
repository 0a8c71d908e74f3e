"""Where the stages of a run begin, marked in figures over its optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from .curves import FONT_SIZES, INK

LINE = {"color": INK, "linewidth": 0.8, "linestyle": ":"}


def mark_stages(figure: Figure, starts: Mapping[str, int]) -> None:
    """Draw a vertical line, with the stage's name, at the step after which each stage begins.

    starts: by name; nothing is drawn for a run of one stage, or on axes without curves.
    """
    if len(starts) < 2:
        return
    for axes in figure.axes:
        if not axes.lines:  # bars, or the colours of layers
            continue
        for name, step in starts.items():
            axes.axvline(step, **LINE)
            position = {"xytext": (3, -2), "textcoords": "offset points", "ha": "left", "va": "top"}
            above = axes.get_xaxis_transform()
            axes.annotate(name, (step, 1), xycoords=above, fontsize=FONT_SIZES["tick"], color=INK, **position)
