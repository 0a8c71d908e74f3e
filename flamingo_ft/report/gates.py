"""How gates open: |tanh| of every gate by layer, as figure 6 of Flamingo (arXiv:2204.14198) has it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .curves import Curve, curve
from .log_file import Entry
from .look import BLUE, ORANGE, POINTS, SIZE, dress

KINDS = {"attention": "Attention gates", "feed_forward": "Feed-forward gates"}
NAMED = 8  # layers up to which each has a line in a legend
COLOURS = colormaps["viridis"].resampled(256)
LIGHTEST = 0.9  # of the colours, the rest is too pale on white


def gate_figure(entries: Sequence[Entry]) -> Figure | None:
    """|tanh| over optimizer steps, one curve for each layer; attention and feed-forward side by side."""
    gates = {kind: _gates(entries, kind) for kind in KINDS}
    layers = sorted({layer for found in gates.values() for layer in found})
    if not layers:
        return None
    figure, panels = _panels()
    norm = Normalize(layers[0], layers[0] + max(layers[-1] - layers[0], 1) / LIGHTEST)
    for axes, (kind, found) in zip(panels, gates.items(), strict=True):
        dress(axes, KINDS[kind], "|tanh(gate)|" if axes is panels[0] else "")
        for layer, one in found.items():
            _open(axes, one, COLOURS(norm(layer)), f"layer {layer}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _scale(panels, gates)
    _tell_layers(figure, panels, layers, norm)
    return figure


def layer_figure(entries: Sequence[Entry]) -> Figure | None:
    """|tanh| of the last entry over the layers."""
    gates = {kind: _gates(entries, kind) for kind in KINDS}
    if not any(gates.values()):
        return None
    figure, panels = _panels()
    for axes, colour, (kind, found) in zip(panels, (BLUE, ORANGE), gates.items(), strict=True):
        dress(axes, f"{KINDS[kind]} by layer", "|tanh(gate)|" if axes is panels[0] else "", "decoder layer")
        axes.bar([*found], [abs(one.values[-1]) for one in found.values()], color=colour, width=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


def _panels() -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    return figure, figure.subplots(1, len(KINDS), sharey=True)


def _gates(entries: Sequence[Entry], kind: str) -> dict[int, Curve]:
    """The curves of one kind of gate by layer."""
    start = f"gate/{kind}/"
    layers = sorted(
        {int(key.removeprefix(start)) for entry in entries for key in entry if key.startswith(start)}
    )
    found = {layer: curve(entries, f"{start}{layer}") for layer in layers}
    return {layer: one for layer, one in found.items() if one is not None}


def _open(axes: Axes, one: Curve, colour: tuple, label: str) -> None:
    """The curve of one gate."""
    marker = "o" if len(one.steps) <= 3 else ""
    values = [abs(value) for value in one.values]
    axes.plot(one.steps, values, color=colour, linewidth=1.2, label=label, marker=marker, markersize=4)


def _scale(panels: Sequence[Axes], gates: dict[str, dict[int, Curve]]) -> None:
    curves = [one for found in gates.values() for one in found.values()]
    highest = max(abs(value) for one in curves for value in one.values)
    panels[0].set_ylim(0, 1.08 * highest or 1)
    for axes in panels:
        axes.set_xlim(0, 1.02 * max(one.steps[-1] for one in curves))


def _tell_layers(figure: Figure, panels: Sequence[Axes], layers: Sequence[int], norm: Normalize) -> None:
    """Which colour is which layer: a legend for a few, a scale for many."""
    if len(layers) <= NAMED:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=POINTS["tick"])
        return
    scale = figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(panels), pad=0.02)
    scale.ax.set_ylim(layers[0], layers[-1])
    scale.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    scale.set_label("decoder layer", fontsize=POINTS["label"])
    scale.ax.tick_params(labelsize=POINTS["tick"])
