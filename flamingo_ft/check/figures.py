"""Histograms of what a check found: matplotlib figures, outside pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .findings import Findings
from .numbers import Distribution

INK, BLUE, RED = "#24292f", "#1f5fa8", "#c0272d"
SIZE, DPI = (4.2, 2.7), 160  # inches, dots per inch


def save_figures(findings: Findings, folder: Path) -> Mapping[str, Path]:
    """Write text_tokens.png, images.png and loss_share.png; by name."""
    figures = {
        "text_tokens": token_figure(findings.distributions["text_tokens"], findings.too_long.limit),
        "images": image_figure(findings.distributions["images"]),
        "loss_share": share_figure(findings.distributions["loss_share"]),
    }
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(paths[name], dpi=DPI)
    return paths


def token_figure(tokens: Distribution, limit: int) -> Figure:
    """Samples over text tokens; the limit where it is near."""
    figure, axes = _histogram("Text tokens of a sample", tokens)
    axes.set_xlabel("text tokens")
    axes.axvline(tokens.median, color=INK, linewidth=1, linestyle=":")
    _note(axes, f" median {tokens.median:,.0f}", (tokens.median, 1), color=INK)
    if limit <= 1.5 * tokens.most:
        axes.axvline(limit, color=RED, linewidth=1)
        _note(axes, f"limit {limit:,} ", (limit, 0.9), color=RED, ha="right")
    return figure


def image_figure(images: Distribution) -> Figure:
    """Samples over their images and videos."""
    figure, axes = _histogram("Images and videos of a sample", images)
    axes.set_xlabel("images and videos")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def share_figure(share: Distribution) -> Figure:
    """Samples over the share of their tokens that carries loss."""
    figure, axes = _histogram("Share of tokens with loss", share)
    axes.set(xlabel="tokens with loss, of all of a sample", xlim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _note(axes: Axes, text: str, place: tuple[float, float], **looks: str) -> None:
    """Small words at a number of tokens, and a height in 0..1."""
    axes.annotate(text, place, xycoords=("data", "axes fraction"), va="top", fontsize=8, **looks)


def _histogram(title: str, values: Distribution) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.stairs(values.counts, values.edges, fill=True, color=BLUE)
    axes.set_title(title, loc="left", color=INK)
    axes.set_ylabel("samples")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
