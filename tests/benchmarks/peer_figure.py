"""The figure of `tests.benchmarks.peer`: seconds and memory by the number of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GRAY, BLUE, ORANGE = "0.45", "tab:blue", "tab:orange"
STYLES = {  # by the name of a measurement: color, line style, label
    "open-flamingo": (GRAY, "-", "open-flamingo"),
    "open-flamingo, bf16": (GRAY, "--", "open-flamingo, autocast to bf16"),
    "fp32": (BLUE, "-", "flamingo_ft, fp32"),
    "bf16": (ORANGE, "-", "flamingo_ft, bf16"),
    "first epoch, fp32": (BLUE, "-", "flamingo_ft, fp32"),
    "first epoch, bf16": (ORANGE, "-", "flamingo_ft, bf16"),
    "later epochs, fp32": (BLUE, ":", "cached tokens, fp32"),
    "later epochs, bf16": (ORANGE, ":", "cached tokens, bf16"),
    "language model alone, fp32": (BLUE, ":", "language model alone, fp32"),
    "language model alone, bf16": (ORANGE, ":", "language model alone, bf16"),
}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the figure of what `peer` measured; parts that are missing are left out."""
    generated = record.get("generate", [])
    panels = {
        "training step": (record.get("step", []), "seconds"),
        "greedy, 32 tokens": ([row for row in generated if row["beams"] == 1], "seconds"),
        "3 beams, 32 tokens": ([row for row in generated if row["beams"] == 3], "seconds"),
        "memory of a training step": (record.get("memory", []), "MiB"),
    }
    drawn = {title: panel for title, panel in panels.items() if panel[0]}
    figure = Figure(figsize=(4 * len(drawn), 4.4), layout="constrained")
    for axes, (title, (rows, unit)) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True
    ):
        _panel(axes, title, rows, unit)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]], unit: str) -> None:
    images = [row["images"] for row in rows]
    for name in rows[0][unit]:
        color, style, label = STYLES[name]
        axes.plot(images, [row[unit][name] for row in rows], style, color=color, marker=".", label=label)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("images in a sample")
    axes.set_ylabel(unit)
    axes.set_xticks(images)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="upper left", handlelength=3)
