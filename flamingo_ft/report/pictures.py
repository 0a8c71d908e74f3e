"""figures/: every figure of a run as a PNG."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flamingo_ft import atomic
from flamingo_ft.evaluation.results import PREDICTIONS_FILE

from . import curves, gates, samples
from .folder import RunFolder
from .log_file import Entry

FIGURES_FOLDER = "figures"
DPI = 130  # dots per inch
SHOWN_ANSWERS = (3, 4)  # rows and columns of questions

FROM_LOG: dict[str, Callable[[Sequence[Entry]], Figure | None]] = {
    "loss": curves.loss_figure,
    "accuracy": curves.accuracy_figure,
    "reward_margin": curves.margin_figure,
    "reward_accuracy": curves.preferred_figure,
    "gates": gates.gate_figure,
    "gates_by_layer": gates.layer_figure,
    "learning_rate": curves.rate_figure,
    "gradient_norm": curves.norm_figure,
    "throughput": curves.throughput_figure,
    "memory": curves.memory_figure,
}
ANSWERS = "answers"


def save_figures(run: RunFolder) -> Mapping[str, Path]:
    """Draw all that the run has something for; by name."""
    folder = run.folder / FIGURES_FOLDER
    folder.mkdir(exist_ok=True)
    paths = {}
    for name, draw in FROM_LOG.items():
        figure = draw(run.entries)
        if figure is not None:
            paths[name] = _save(figure, folder / f"{name}.png")
    if run.predictions:
        paths[ANSWERS] = _answers(run, folder / f"{ANSWERS}.png")
    return paths


def _answers(run: RunFolder, path: Path) -> Path:
    """The answers, drawn anew only where there are new ones: it is the slowest figure."""
    if path.is_file() and path.stat().st_mtime > (run.folder / PREDICTIONS_FILE).stat().st_mtime:
        return path
    return _save(samples.answers_figure(run.predictions, *SHOWN_ANSWERS), path)


def _save(figure: Figure, path: Path) -> Path:
    with atomic.file_in_place(path) as place, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)  # shown as an empty box
        figure.savefig(place, dpi=DPI, format="png")
    return path
