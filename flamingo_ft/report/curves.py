"""Curves over the optimizer steps of a run, from its log, and the common look of all figures.

A figure is None if the log has no data for it. All are drawn without pyplot, which would keep global state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from flamingo_ft.config import LOG_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.image_loss_gap import CLEAR, ImageLossGap
from flamingo_ft.evaluation.loss_by_kind import KIND_LABELS, log_key
from flamingo_ft.evaluation.metrics import Metric
from flamingo_ft.formatting import percent, significant

from .run_folder import Entry, check_run, read_log

# The common look of all figures of a run.
INK = "#24292f"
BLUE, GREEN, RED, ORANGE, VIOLET, TEAL = "#1f5fa8", "#1a7f37", "#c0272d", "#b35900", "#6f42c1", "#0b7a75"
FIGURE_SIZE = (7.0, 3.0)  # inches
FONT_SIZES = {"title": 12, "label": 10, "tick": 9}  # points

MAX_POINTS = 2000  # per curve; more would be finer than a pixel
MAX_LEGEND_CHARACTERS = 40  # of all labels; a longer legend would reach the title, and is inside the axes
MAX_MARKED_POINTS = 12  # curves of so few points show each as a dot
LOG_SCALE_RATIO = 50  # a gradient norm that spans more than this has a logarithmic axis
EARLY_SHARE = 0.1  # of the steps, whose losses may be cut off at the top
CUT_OFF_RATIO = 2.0  # if they exceed all later ones by more than this factor
PER_LABEL_TOKEN = "loss (nats per label token)"
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, TEAL)
STEP_LABEL = "optimizer step"
Write = Callable[[float], str]  # value -> text


@dataclass(frozen=True)
class Curve:
    """Finite values over steps."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def curve(entries: Sequence[Entry], key: str, label: str = "") -> Curve | None:
    """Return the finite values of a log key, thinned if there are many; the last point is kept."""
    points = [(entry["step"], entry[key]) for entry in entries if key in entry and math.isfinite(entry[key])]
    if not points:
        return None
    stride = math.ceil(len(points) / MAX_POINTS)
    kept = points[::-1][::stride][::-1]
    return Curve(label, tuple(step for step, _ in kept), tuple(value for _, value in kept))


def loss_curve(run: str | Path) -> Figure:
    """Plot the training loss (nats per label token), and the held-out loss if it was evaluated.

    Raises UserError if the run in the folder has logged no loss.
    """
    check_run(Path(run), LOG_FILE)
    figure = loss_figure(read_log(Path(run)))
    if figure is None:
        raise UserError(
            f"{run}: {LOG_FILE} has no loss; train with train.logging_steps below train.max_steps"
        )
    return figure


def loss_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the loss in training and on held-out samples; of GRPO only the latter, if there is one.

    Much larger losses at the very beginning are above the axis, so that the end of the curve is readable.
    """
    training, evaluation = curve(entries, "loss", "training"), curve(entries, "eval_loss", "held-out")
    is_grpo = any("reward" in entry for entry in entries)
    if is_grpo and evaluation is not None:  # another quantity than the policy loss of training
        return _figure("Held-out loss", PER_LABEL_TOKEN, [evaluation], from_zero=True)
    curves = _present(training, evaluation)
    title = "Loss" if len(curves) > 1 else "Training loss"
    figure = _figure(title, _loss_unit(entries), curves, from_zero=True)
    if figure is not None:
        _cut_off_early(figure.axes[0], curves)
    return figure


def _cut_off_early(axes: Axes, curves: Sequence[Curve]) -> None:
    """Let the axis end above the later values if early ones are much larger, and write down the largest."""
    points = [point for one in curves for point in zip(one.steps, one.values, strict=True)]
    last = max(step for step, _ in points)
    later = max((value for step, value in points if step > EARLY_SHARE * last), default=0.0)
    first, largest = max(points, key=lambda point: point[1])
    if min(value for _, value in points) >= 0 and largest > CUT_OFF_RATIO * later > 0:
        axes.set_ylim(0, 1.3 * later)  # with room for the text
        text = f"up to {significant(largest)} at step {first:,}"
        place = {"xytext": (6, -14), "textcoords": "offset points", "ha": "left", "va": "top"}
        axes.annotate(text, (EARLY_SHARE, 1), xycoords="axes fraction", fontsize=9, color=INK, **place)


def _loss_unit(entries: Sequence[Entry]) -> str:
    """Return the unit of the training loss; the stages of a run may differ."""
    training = [entry for entry in entries if "loss" in entry]
    return " or ".join(dict.fromkeys(map(_unit_of_entry, training))) or PER_LABEL_TOKEN


def _unit_of_entry(entry: Entry) -> str:
    if "reward" in entry:  # GRPO
        return "policy loss"
    if "kl" in entry:  # KTO
        return "loss (0 to 1, per answer)"
    return "loss (nats per pair)" if "rewards/accuracies" in entry else PER_LABEL_TOKEN


def reward_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the mean reward of the sampled answers (GRPO)."""
    scored = [entry for entry in entries if entry.get("reward") is not None]
    return _figure("Reward of sampled answers", "mean reward", _present(curve(scored, "reward")))


def loss_by_kind_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the held-out loss of rows without images, and below it that of those with images."""
    curves = _present(*(curve(entries, log_key(kind), label) for kind, label in KIND_LABELS.items()))
    if not curves:
        return None
    figure = new_figure()
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, one, colour in zip(panels, curves, COLOURS, strict=False):
        title = "Held-out loss, nats per label token" if axes is panels[0] else ""
        style_axes(axes, title, one.label, STEP_LABEL if axes is panels[-1] else "")
        _draw(axes, [one], [colour], from_zero=True, write=significant)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    figure.align_ylabels()
    return figure


def image_loss_gap_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot by how much the held-out loss rises with another image, and a band of three standard errors."""
    gaps = [(entry["step"], gap) for entry in entries if (gap := ImageLossGap.of_log(entry)) is not None]
    points = [
        {"step": step, "gap": gap.value, "error": CLEAR * gap.standard_error}
        for step, gap in gaps
        if math.isfinite(gap.value)
    ]
    one, error = curve(points, "gap"), curve(points, "error")
    if one is None or error is None:
        return None
    figure = _figure("Loss explained by the images", "nats per label token", [one])
    assert figure is not None
    axes = figure.axes[0]
    low, high = (
        [value + sign * margin for value, margin in zip(one.values, error.values, strict=True)]
        for sign in (-1, 1)
    )
    axes.fill_between(one.steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8, linestyle="--")
    return figure


def metric_figure(entries: Sequence[Entry], metric: Metric) -> Figure | None:
    """Plot a metric at each evaluation during training."""
    curves = _present(curve(entries, f"eval_{metric.name}"))
    title = f"{metric.title} on held-out samples"
    return _figure(title, metric.axis or metric.label, curves, is_fraction=metric.is_fraction)


def learning_rate_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the learning rate of each part; parts with identical values share a curve."""
    prefix = "learning_rate/"
    keys = sorted({key for entry in entries for key in entry if key.startswith(prefix)})
    by_points: dict[tuple, list[str]] = {}
    rates = (curve(entries, key, key.removeprefix(prefix)) for key in keys or ["learning_rate"])
    for one in _present(*rates):
        by_points.setdefault((one.steps, one.values), []).append(one.label.replace("_", " "))
    curves = [Curve(", ".join(parts), steps, values) for (steps, values), parts in by_points.items()]
    figure = _figure("Learning rate", "learning rate", curves, from_zero=True)
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    return figure


def gradient_norm_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the norm of the gradient before clipping."""
    curves = _present(curve(entries, "grad_norm"))
    return _figure("Gradient norm", "norm before clipping", curves, from_zero=True, may_be_log=True)


def throughput_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot label tokens and images per second, one above the other."""
    keys = {"label tokens": "label_tokens_per_second", "images": "images_per_second"}
    by_unit = {unit: curve(entries, key) for unit, key in keys.items()}
    curves = {unit: one for unit, one in by_unit.items() if one is not None and any(one.values)}
    if not curves:
        return None
    figure = new_figure()
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for number, (axes, (unit, one)) in enumerate(zip(panels, curves.items(), strict=True)):
        is_last = number == len(panels) - 1
        title = "Throughput" if number == 0 else ""
        style_axes(axes, title, f"{unit}/s", STEP_LABEL if is_last else "")
        _draw(axes, [one], [COLOURS[number]], from_zero=True, write=significant)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    figure.align_ylabels()
    return figure


def memory_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot memory: on a GPU the peak since the last entry, on a CPU the resident memory of the process."""
    return _figure("Memory", "GiB", _present(curve(entries, "memory_gib")), from_zero=True)


def reward_margin_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot by how much the reward of good answers exceeds that of bad ones (DPO, KTO)."""
    curves = _training_and_eval(entries, "rewards/margins")
    return _figure("Reward margin", "good minus bad answers", curves)


def reward_accuracy_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the fraction of pairs whose chosen answer has the higher reward (DPO)."""
    curves = _training_and_eval(entries, "rewards/accuracies")
    return _figure("Pairs ranked correctly", "fraction of pairs", curves, is_fraction=True)


def _training_and_eval(entries: Sequence[Entry], key: str) -> list[Curve]:
    return _present(curve(entries, key, "training"), curve(entries, f"eval_{key}", "held-out"))


def _present(*curves: Curve | None) -> list[Curve]:
    return [one for one in curves if one is not None]


def _figure(
    title: str,
    ylabel: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    is_fraction: bool = False,
    may_be_log: bool = False,
) -> Figure | None:
    """Plot curves on one pair of axes. is_fraction: values in 0..1, shown in percent."""
    if not curves:
        return None
    figure, axes = new_axes(title, ylabel)
    write = percent if is_fraction else significant
    _draw(axes, curves, COLOURS, from_zero=from_zero, may_be_log=may_be_log, write=write)
    if is_fraction:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if len(curves) > 1:
        above_right: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
        is_long = sum(len(one.label) for one in curves) > MAX_LEGEND_CHARACTERS
        place = (
            {"loc": "upper right", "bbox_to_anchor": (1, 0.93)} if is_long else {"ncols": 3, **above_right}
        )
        axes.legend(frameon=False, fontsize=9, **place)
    return figure


def _draw(
    axes: Axes,
    curves: Sequence[Curve],
    colours: Sequence[str],
    *,
    from_zero: bool,
    write: Write,
    may_be_log: bool = False,
) -> None:
    for one, colour in zip(curves, cycle(colours), strict=False):
        few = len(one.steps) <= MAX_MARKED_POINTS
        label = f"{one.label} {write(one.values[-1])}"
        marker = {"marker": "o" if few else "", "markersize": 4}
        axes.plot(one.steps, one.values, color=colour, linewidth=1.8, label=label, **marker)
        if not few:
            axes.plot(one.steps[-1], one.values[-1], "o", color=colour, markersize=5)
        if len(curves) == 1:  # several would overlap; the legend has their last values
            _label_last(axes, one, colour, write)
    steps = [step for one in curves for step in one.steps]
    axes.set_xlim(0, max(steps) * 1.02 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    values = [value for one in curves for value in one.values]
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high > LOG_SCALE_RATIO * low:
        axes.set_yscale("log")
    elif from_zero and low >= 0:
        axes.set_ylim(0, 1.08 * high or 1)


def _label_last(axes: Axes, one: Curve, colour: str, write: Write) -> None:
    """Write the last value to the right of the curve's end."""
    position = {"xytext": (7, 5), "textcoords": "offset points", "ha": "left", "va": "center"}
    last = one.steps[-1], one.values[-1]
    axes.annotate(write(one.values[-1]), last, color=colour, fontsize=9, **position)


# --- the common look ---


def new_axes(title: str, ylabel: str, xlabel: str = STEP_LABEL) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = new_figure()
    axes = figure.subplots()
    style_axes(axes, title, ylabel, xlabel)
    return figure, axes


def new_figure() -> Figure:
    """Return an empty figure of the common size."""
    return Figure(figsize=FIGURE_SIZE, layout="constrained", facecolor="white")


def style_axes(axes: Axes, title: str, ylabel: str, xlabel: str = STEP_LABEL) -> None:
    """Set title and labels, and give axes the common look."""
    axes.set_title(title, loc="left", color=INK, fontsize=FONT_SIZES["title"])
    axes.set_xlabel(xlabel, fontsize=FONT_SIZES["label"], color=INK)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZES["label"], color=INK)
    axes.tick_params(labelsize=FONT_SIZES["tick"], colors=INK)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
