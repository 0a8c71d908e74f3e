"""How far gates are open: |tanh| of every gate by layer, as in figure 6 of Flamingo (arXiv:2204.14198)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .curves import BLUE, FONT_SIZES, ORANGE, Curve, curve, new_figure, style_axes
from .run_folder import Entry

KINDS = {"attention": "Attention gates", "feed_forward": "Feed-forward gates"}
MAX_LEGEND_LAYERS = 8  # more layers have a colour bar instead of a legend
COLOURS = colormaps["viridis"].resampled(256)
LIGHTEST = 0.9  # part of the colour map that is used; the rest is too pale on white
Gates = dict[int, Curve]  # decoder layer -> curve


def gate_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot |tanh(gate)| of attention and feed-forward gates over optimizer steps, one curve per layer."""
    gates = {kind: _gates(entries, kind) for kind in KINDS}
    layers = sorted({layer for by_layer in gates.values() for layer in by_layer})
    if not layers:
        return None
    figure, panels = _panels()
    norm = Normalize(layers[0], layers[0] + max(layers[-1] - layers[0], 1) / LIGHTEST)
    for axes, (kind, by_layer) in zip(panels, gates.items(), strict=True):
        style_axes(axes, KINDS[kind], "|tanh(gate)|" if axes is panels[0] else "")
        for layer, one in by_layer.items():
            _draw(axes, one, COLOURS(norm(layer)), f"layer {layer}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _set_limits(panels, [one for by_layer in gates.values() for one in by_layer.values()])
    _add_layer_key(figure, panels, layers, norm)
    return figure


def layer_figure(entries: Sequence[Entry]) -> Figure | None:
    """Plot the newest |tanh(gate)| by layer, as bars."""
    gates = {kind: _gates(entries, kind) for kind in KINDS}
    if not any(gates.values()):
        return None
    figure, panels = _panels()
    for axes, colour, (kind, by_layer) in zip(panels, (BLUE, ORANGE), gates.items(), strict=True):
        ylabel = "|tanh(gate)|" if axes is panels[0] else ""
        style_axes(axes, f"{KINDS[kind]} by layer", ylabel, "decoder layer")
        axes.bar([*by_layer], [abs(one.values[-1]) for one in by_layer.values()], color=colour, width=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


def _panels() -> tuple[Figure, Sequence[Axes]]:
    figure = new_figure()
    return figure, figure.subplots(1, len(KINDS), sharey=True)


def _gates(entries: Sequence[Entry], kind: str) -> Gates:
    """Return the curves of one kind of gate."""
    prefix = f"gate/{kind}/"
    keys = {key for entry in entries for key in entry if key.startswith(prefix)}
    layers = sorted(int(key.removeprefix(prefix)) for key in keys)
    curves = {layer: curve(entries, f"{prefix}{layer}") for layer in layers}
    return {layer: one for layer, one in curves.items() if one is not None}


def _draw(axes: Axes, one: Curve, colour: tuple, label: str) -> None:
    marker = "o" if len(one.steps) <= 3 else ""
    values = [abs(value) for value in one.values]
    axes.plot(one.steps, values, color=colour, linewidth=1.2, label=label, marker=marker, markersize=4)


def _set_limits(panels: Sequence[Axes], curves: Sequence[Curve]) -> None:
    highest = max(abs(value) for one in curves for value in one.values)
    panels[0].set_ylim(0, 1.08 * highest or 1)
    for axes in panels:
        axes.set_xlim(0, 1.02 * max(one.steps[-1] for one in curves))


def _add_layer_key(figure: Figure, panels: Sequence[Axes], layers: Sequence[int], norm: Normalize) -> None:
    """Show which colour is which layer: a legend for a few layers, a colour bar for many."""
    if len(layers) <= MAX_LEGEND_LAYERS:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=FONT_SIZES["tick"])
        return
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(panels), pad=0.02)
    bar.ax.set_ylim(layers[0], layers[-1])
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar.set_label("decoder layer", fontsize=FONT_SIZES["label"])
    bar.ax.tick_params(labelsize=FONT_SIZES["tick"])
