"""Draw the table of tiles in this folder's README: `python -m tests.benchmarks.detail_figure FILE.png`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

README = Path(__file__).parent / "README.md"
ROW = re.compile(r"\| (one view|(\d+) tiles)(, 64 latents)? \| \**([\d.]+) ± ([\d.]+) %")
LABELS = {"": "text attends to the tokens of all views", ", 64 latents": "a perceiver of 64 latents"}


def curves(text: str) -> dict[str, list[tuple[int, float, float]]]:
    """Return tiles, mean and standard deviation of each row, by what comes after the number of tiles."""
    points: dict[str, list[tuple[int, float, float]]] = {suffix: [] for suffix in LABELS}
    for _, tiles, suffix, mean, deviation in ROW.findall(text):
        points[suffix].append((int(tiles or 1), float(mean), float(deviation)))
    return {suffix: sorted(rows) for suffix, rows in points.items()}


def figure(text: str) -> Figure:
    """Return the figure of accuracy over tiles."""
    drawn = Figure(figsize=(6, 3.2), layout="constrained")
    axes = drawn.subplots()
    for (suffix, rows), marker in zip(curves(text).items(), "os", strict=True):
        tiles, means, deviations = zip(*rows, strict=True)
        axes.errorbar(tiles, means, deviations, marker=marker, capsize=3, label=LABELS[suffix])
    axes.set_xticks([1, 2, 6, 8], ["one view", "2 tiles", "6", "8"])
    axes.set_ylim(-4, 104)
    axes.set_ylabel("lines read exactly, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return drawn


if __name__ == "__main__":
    figure(README.read_text(encoding="utf-8")).savefig(sys.argv[1], dpi=150)
