"""The figure of a `Look`: the pictures once as they are, then once per token under its attention.

Shapes: T tokens, M media, F frames, H and W pixels, h and w the grid of visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flamingo_ft.formatting import percent
from flamingo_ft.model.tiles import UNTILED, Grid

INK = "#24292f"
PICTURE_INCHES, MAX_WIDTH_INCHES = 1.5, 10.0  # height of a picture; width of all panels
TITLE_INCHES, SHARE_INCHES, BAR_INCHES = 0.36, 0.22, 0.9
BAR_LENGTH_INCHES, BAR_WIDTH_INCHES = 2.2, 0.13
GAP = 0.06  # between the pictures of a panel, in picture heights
TITLE_POINTS, LABEL_POINTS = 11, 9
MAX_TITLE_CHARACTERS = 18
PLAIN_TITLE = "as the tower sees it"
Place = tuple[float, float, float, float]  # left, right, bottom and top, in picture heights
# From transparent to red: patches with no more attention than if it were spread evenly show the picture.
COLOURS = LinearSegmentedColormap.from_list("attention", [(0.9, 0.1, 0.0, 0.0), (0.9, 0.1, 0.0, 0.9)])
MIN_SCALE = 2.0  # times the even weight, at which the scale ends at least: noise of even attention stays pale
DARKEST, LIGHTEST = 90, 240  # of the grey pictures: red is as visible on black as on white


def draw_look(
    pictures: Sequence[np.ndarray], grids: Sequence[Grid], tokens: Sequence[str], weights: np.ndarray
) -> Figure:
    """Draw weights (T, M, F, h, w) over the pictures (F, H, W, 3) of each medium, one panel per token.

    grids: of each medium's tiles, which are put together to the image. The pictures come first without
    weights. The colours of all panels are on the scale of `colour_limits`. Of several media, each shows its
    share of the token's attention.
    """
    places = _places(pictures, grids)
    width = places[-1][-1][1]
    height = min(PICTURE_INCHES, MAX_WIDTH_INCHES / width)
    columns = min(len(tokens) + 1, max(1, int(MAX_WIDTH_INCHES / (height * width))))
    rows = -(-(len(tokens) + 1) // columns)
    panel_height = height + TITLE_INCHES + (len(pictures) > 1) * SHARE_INCHES
    figure = Figure(
        figsize=(columns * (height * width + 0.25) + BAR_INCHES, rows * panel_height),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.04),
        facecolor="white",
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    limits = colour_limits(weights)
    for axes in panels.flat:
        axes.set_axis_off()
    first, *others = panels.flat
    _draw_strip(first, PLAIN_TITLE, pictures, places)
    for axes, token, own in zip(others, tokens, weights, strict=False):
        _draw_strip(axes, token_title(token), [_grey(frames) for frames in pictures], places)
        _draw_weights(axes, places, own, limits)
    _draw_bar(figure, panels, limits)
    return figure


def colour_limits(weights: np.ndarray) -> tuple[float, float]:
    """Return the weights without colour and of full colour, for weights (T, M, F, h, w).

    The first is that of each visual token if attention were spread evenly over those that get any. The second
    is the largest, but at least twice the first, so that almost even attention looks like it.
    """
    visible = np.count_nonzero(weights.any(axis=0))
    even = 1 / visible if visible else 0.0
    return even, max(float(weights.max(initial=0)), MIN_SCALE * even) or 1.0


def _places(pictures: Sequence[np.ndarray], grids: Sequence[Grid]) -> list[list[Place]]:
    """Return where each frame of each medium is drawn, side by side; tiles as one image."""
    places, left = [], 0.0
    for frames, grid in zip(pictures, grids, strict=True):
        width = frames.shape[2] / frames.shape[1]
        tiles = _tile_places(grid, width)
        lefts = [index * (width + GAP) for index in range(len(frames) - len(tiles))]
        own = [(start, start + width, 0.0, 1.0) for start in lefts]
        shift = len(lefts) * (width + GAP)
        own += [(shift + start, shift + end, bottom, top) for start, end, bottom, top in tiles]
        places.append([(left + start, left + end, bottom, top) for start, end, bottom, top in own])
        left = places[-1][-1][1] + GAP
    return places


def _tile_places(grid: Grid, width: float) -> list[Place]:
    """Return the places of tiles, each as wide as ``width`` times its height, in an image of height 1."""
    rows, columns = grid
    if grid == UNTILED:
        return []
    return [
        (column * width / rows, (column + 1) * width / rows, 1 - (row + 1) / rows, 1 - row / rows)
        for row in range(rows)
        for column in range(columns)
    ]


def _draw_strip(
    axes: Axes, title: str, pictures: Sequence[np.ndarray], places: Sequence[Sequence[Place]]
) -> None:
    """Draw all pictures side by side."""
    for frames, own in zip(pictures, places, strict=True):
        for frame, place in zip(frames, own, strict=True):
            axes.imshow(frame, extent=place, interpolation="antialiased")
    axes.set(xlim=(0, places[-1][-1][1]), ylim=(0, 1), aspect="equal")
    axes.set_title(title, fontsize=TITLE_POINTS, color=INK, parse_math=False)


def _draw_weights(
    axes: Axes, places: Sequence[Sequence[Place]], weights: np.ndarray, limits: tuple[float, float]
) -> None:
    """Draw weights (M, F, h, w) over the strip, and under each of several media its share."""
    look: dict[str, Any] = {"cmap": COLOURS, "norm": Normalize(*limits), "interpolation": "nearest"}
    for number, (places_of_medium, own) in enumerate(zip(places, weights, strict=True), start=1):
        for place, grid in zip(places_of_medium, own, strict=False):
            axes.imshow(grid, extent=place, **look)
        if len(places) > 1:
            middle = (places_of_medium[0][0] + places_of_medium[-1][1]) / 2
            share = f"image {number}: {percent(float(own.sum()), digits=0)}"
            axes.text(middle, -0.04, share, fontsize=LABEL_POINTS, color=INK, ha="center", va="top")


def _grey(frames: np.ndarray) -> np.ndarray:
    """Return frames (F, H, W, 3) in grey, so that only the weights have a hue."""
    luma = frames @ np.array([0.299, 0.587, 0.114]) / 255
    levels = DARKEST + (LIGHTEST - DARKEST) * luma
    return np.repeat(levels[..., None], 3, axis=-1).round().astype(np.uint8)


def token_title(token: str) -> str:
    """Return a token as a title; white space alone is quoted."""
    text = token.strip() or repr(token)
    return text if len(text) <= MAX_TITLE_CHARACTERS else text[: MAX_TITLE_CHARACTERS - 1] + "…"


def _draw_bar(figure: Figure, panels: np.ndarray, limits: tuple[float, float]) -> None:
    """Draw the colour scale at the upper right, in the same size beside any number of panels."""
    even, _ = limits
    height = figure.get_figheight()
    length = min(BAR_LENGTH_INCHES, 0.85 * height)
    bar = figure.colorbar(
        ScalarMappable(Normalize(*limits), COLOURS),
        ax=panels,
        anchor=(0.0, 1.0),
        shrink=length / height,
        aspect=length / BAR_WIDTH_INCHES,
        pad=0.02,
    )
    bar.ax.set_facecolor("#9b9b9b")  # a grey between those of the pictures
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    label = f"attention per patch\n(no colour: even, {100 * even:.2g} %)"
    bar.set_label(label, fontsize=LABEL_POINTS, color=INK)
    bar.ax.tick_params(labelsize=LABEL_POINTS, colors=INK)
