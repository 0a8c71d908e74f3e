"""Curves over a run's optimizer steps, from the entries of its log. Each is None where the log has nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import percent, significant

from .log_file import LOG_FILE, Entry, read_log
from .look import BLUE, GREEN, ORANGE, RED, SIZE, TEAL, VIOLET, check_run, dress, new_axes

MOST_POINTS = 2000  # of a curve; more are finer than a pixel
WIDE_RANGE = 50  # ratio of values from which on their axis is logarithmic
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, TEAL)
RATE = "learning_rate"
Write = Callable[[float], str]  # a value, for people to read


@dataclass(frozen=True)
class Curve:
    """Values over steps; those that are no numbers are left out."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def curve(entries: Sequence[Entry], key: str, label: str = "") -> Curve | None:
    """What the log has under a key, the last point always among them."""
    found = [(entry["step"], entry[key]) for entry in entries if key in entry and math.isfinite(entry[key])]
    stride = -(-len(found) // MOST_POINTS) or 1
    kept = found[::-1][::stride][::-1]
    return Curve(label, *map(tuple, zip(*kept, strict=True))) if kept else None


def loss_curve(run: str | Path) -> Figure:
    """Training loss (nats per label token) over optimizer steps, and that of evaluations on the way. UserError where a
    run has logged none."""
    check_run(Path(run), LOG_FILE)
    figure = loss_figure(read_log(Path(run)))
    if figure is None:
        remedy = "train with train.logging_steps below train.max_steps"
        raise UserError(f"{run}: {LOG_FILE} has no loss; {remedy}")
    return figure


def loss_figure(entries: Sequence[Entry]) -> Figure | None:
    """Loss in training and on held-out samples."""
    curves = _found(curve(entries, "loss", "training"), curve(entries, "eval_loss", "held out"))
    preferences = any("rewards/margins" in entry for entry in entries)
    unit = "loss (nats per pair)" if preferences else "loss (nats per label token)"
    return _figure("Loss" if len(curves) > 1 else "Training loss", unit, curves, from_zero=True)


def accuracy_figure(entries: Sequence[Entry]) -> Figure | None:
    """Accuracy of evaluations on the way."""
    curves = _found(curve(entries, "eval_accuracy"))
    return _figure("Accuracy on held-out samples", "right answers", curves, share=True)


def rate_figure(entries: Sequence[Entry]) -> Figure | None:
    """Learning rates of the parts; parts with one course are one curve."""
    keys = sorted({key for entry in entries for key in entry if key.startswith(f"{RATE}/")}) or [RATE]
    same: dict[tuple, list[str]] = {}
    for found in _found(*(curve(entries, key, key.removeprefix(f"{RATE}/")) for key in keys)):
        same.setdefault((found.steps, found.values), []).append(found.label.replace("_", " "))
    curves = [Curve(", ".join(parts), *points) for points, parts in same.items()]
    figure = _figure("Learning rate", "learning rate", curves, from_zero=True)
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    return figure


def norm_figure(entries: Sequence[Entry]) -> Figure | None:
    """Norm of the gradient before clipping."""
    return _figure(
        "Gradient norm", "norm before clipping", _found(curve(entries, "grad_norm")), from_zero=True
    )


def throughput_figure(entries: Sequence[Entry]) -> Figure | None:
    """Label tokens and images a second."""
    keys = {"label tokens": "label_tokens_per_second", "images": "images_per_second"}
    rows = {unit: curve(entries, key) for unit, key in keys.items()}
    shown = {unit: found for unit, found in rows.items() if found and any(found.values)}
    if not shown:
        return None
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    all_axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, colour, (unit, found) in zip(all_axes, COLOURS, shown.items(), strict=False):
        dress(axes, "", f"{unit}/s", "")
        _draw(axes, [found], [colour], from_zero=True, write=significant)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    dress(all_axes[0], "Throughput", all_axes[0].get_ylabel(), all_axes[0].get_xlabel())
    all_axes[-1].set_xlabel("optimizer step")
    figure.align_ylabels()
    return figure


def memory_figure(entries: Sequence[Entry]) -> Figure | None:
    """Memory: of a GPU the peak since the last entry, of a CPU what the process holds."""
    return _figure("Memory", "GiB", _found(curve(entries, "memory_gib")), from_zero=True)


def margin_figure(entries: Sequence[Entry]) -> Figure | None:
    """How much more reward the better answer of a pair has."""
    return _figure("Reward margin", "chosen minus rejected", _pair(entries, "rewards/margins"))


def preferred_figure(entries: Sequence[Entry]) -> Figure | None:
    """Share of the pairs whose better answer has the higher reward."""
    return _figure("Pairs ranked rightly", "share of pairs", _pair(entries, "rewards/accuracies"), share=True)


def _pair(entries: Sequence[Entry], key: str) -> list[Curve]:
    return _found(curve(entries, key, "training"), curve(entries, f"eval_{key}", "held out"))


def _found(*curves: Curve | None) -> list[Curve]:
    return [one for one in curves if one is not None]


def _figure(
    title: str, ylabel: str, curves: Sequence[Curve], *, from_zero: bool = False, share: bool = False
) -> Figure | None:
    """One pair of axes. share: values in 0..1, shown in percent."""
    if not curves:
        return None
    figure, axes = new_axes(title, ylabel)
    _draw(axes, curves, COLOURS, from_zero=from_zero, write=percent if share else significant)
    if share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if len(curves) > 1:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.2
        )
    return figure


def _draw(
    axes: Axes, curves: Sequence[Curve], colours: Sequence[str], *, from_zero: bool, write: Write
) -> None:
    for one, colour in zip(curves, cycle(colours), strict=False):
        few = len(one.steps) <= 12
        label = f"{one.label} {write(one.values[-1])}"
        points = {"marker": "o" if few else "", "markersize": 4}
        axes.plot(one.steps, one.values, color=colour, linewidth=1.8, label=label, **points)
        if not few:
            axes.plot(one.steps[-1], one.values[-1], "o", color=colour, markersize=5)
        if len(curves) == 1:  # the legend has those of several, which would lie over each other
            _name_last(axes, one, colour, write)
    steps = [step for one in curves for step in one.steps]
    axes.set_xlim(0, max(steps) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _set_height(axes, [value for one in curves for value in one.values], from_zero)


def _name_last(axes: Axes, one: Curve, colour: str, write: Write) -> None:
    """The last value, right of the curve's end."""
    beside = {"xytext": (7, 5), "textcoords": "offset points", "ha": "left", "va": "center"}
    axes.annotate(write(one.values[-1]), (one.steps[-1], one.values[-1]), color=colour, fontsize=9, **beside)


def _set_height(axes: Axes, values: Sequence[float], from_zero: bool) -> None:
    """Limits of the y axis; logarithmic where values lie far apart."""
    low, high = min(values), max(values)
    if from_zero and low > 0 and high > WIDE_RANGE * low and axes.get_ylabel().startswith("norm"):
        axes.set_yscale("log")
    elif from_zero and low >= 0:
        axes.set_ylim(0, 1.08 * high or 1)
