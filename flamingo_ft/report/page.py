"""report.html, one page that needs no other files, network or scripts, and the images in figures/."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from flamingo_ft import atomic
from flamingo_ft.evaluation.metrics import METRICS
from flamingo_ft.evaluation.results import (
    COLUMN_HEADERS,
    NO_USE,
    NOT_LOOKING,
    PREDICTIONS_FILE,
    READS_IMAGES,
    class_scores,
    score_tables,
)
from flamingo_ft.formatting import data_uri, duration, percent, significant
from flamingo_ft.templates import load_template
from flamingo_ft.version import __version__

from . import curves, gates
from .log_file import Entry
from .run_folder import RunFolder
from .sample_grid import answers_figure

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
DPI = 130  # dots per inch
ANSWERS, ANSWERS_SHAPE = "answers", (3, 4)  # name of that figure; rows and columns of questions
REFRESH_SECONDS = 30  # interval at which a browser reloads the page of a run in progress
LOSS_CAPTIONS = {
    "sft": "Cross-entropy of the reference answers: how surprised the model is by them.",
    "dpo": "The preference loss (sigmoid: 0.69 for no preference, towards 0 as the chosen answers win).",
}


def write_report(folder: str | Path, *, in_progress: bool = False, stopped_by: str | None = None) -> Path:
    """Draw the figures of a run and write its page, from the files in its folder alone.

    in_progress: let the page reload itself. stopped_by: what ended the run early, if anything did. Returns
    the path of the page. Raises UserError if the folder holds no run.
    """
    run = RunFolder.read(Path(folder))
    figures = {name: data_uri(path.read_bytes()) for name, path in save_figures(run).items()}
    template = load_template("report/report.html.jinja", trim_blocks=True, lstrip_blocks=True)
    verdict = run.evaluation.get("verdict")
    tasks = run.evaluation.get("per_task", {})
    metrics = list(METRICS.values())
    page = template.render(
        version=__version__,
        run=run,
        status=status(run, in_progress, stopped_by),
        refresh=REFRESH_SECONDS if in_progress else None,
        facts=facts(run),
        figures=figures,
        metrics=metrics,
        tables=score_tables(run.evaluation),
        headers=COLUMN_HEADERS,
        classes=class_scores(run.evaluation, metrics),
        free_text=[name for name, task in tasks.items() if task.get("free_text")],
        verdict=verdict,
        verdict_kind=_verdict_kind(verdict),
        loss_caption=LOSS_CAPTIONS[run.recipe.train.method],
        percent=percent,
        duration=duration,
    )
    atomic.write_text(run.folder / REPORT_FILE, page)
    return run.folder / REPORT_FILE


def status(run: RunFolder, in_progress: bool, stopped_by: str | None) -> tuple[str, str]:
    """Return the state of a run in words, and its kind: good, warn or bad."""
    progress = f"step {run.step:,} of {run.steps:,}"
    if run.finished:
        return f"finished after {run.training['steps']:,} steps", "good"
    if stopped_by is not None:
        return f"stopped at {progress} by {stopped_by}", "bad"
    return (f"training, {progress}", "warn") if in_progress else (f"not finished, {progress}", "bad")


def _verdict_kind(verdict: str | None) -> str:
    if verdict is None:
        return ""
    if verdict.startswith((NOT_LOOKING, NO_USE)):
        return "bad"
    return "good" if verdict.startswith(f"{READS_IMAGES}:") else "warn"


def facts(run: RunFolder) -> dict[str, str]:
    """Return the numbers at the head of the report, as name -> text; of the log, the newest values."""
    known = {}
    if run.training:
        known["trainable parameters"] = f"{run.training['trainable_parameters']:,}"
    if run.seconds is not None:
        known["training time"] = duration(run.seconds)
    for name, key, write in _logged_facts():
        value = run.last(key)
        if value is not None:
            known[name] = write(value)
    if "best" in run.training:
        known["best evaluation"] = f"step {run.training['best']['step']:,}"
    return known


def _logged_facts() -> list[tuple[str, str, Callable[[float], str]]]:
    """Name, key in the log, and how the value is written."""
    return [
        ("loss", "loss", "{:.4g}".format),
        ("held-out loss", "eval_loss", "{:.4g}".format),
        *((f"held-out {metric.label}", f"eval_{name}", metric.text) for name, metric in METRICS.items()),
        ("reward margin", "rewards/margins", "{:.3g}".format),
        ("pairs ranked correctly", "rewards/accuracies", percent),
        ("label tokens/s", "label_tokens_per_second", significant),
        ("images/s", "images_per_second", significant),
        ("memory", "memory_gib", "{:.2f} GiB".format),
        ("skipped steps", "skipped_steps", "{:,}".format),
    ]


def save_figures(run: RunFolder) -> Mapping[str, Path]:
    """Draw every figure that the run has data for. Returns name -> PNG file."""
    folder = run.folder / FIGURES_FOLDER
    folder.mkdir(exist_ok=True)
    paths = {}
    for name, draw in _log_figures().items():
        figure = draw(run.entries)
        if figure is not None:
            paths[name] = _save(figure, folder / f"{name}.png")
    if run.predictions:
        paths[ANSWERS] = _save_answers(run, folder / f"{ANSWERS}.png")
    return paths


def _log_figures() -> dict[str, Callable[[Sequence[Entry]], Figure | None]]:
    """Figures drawn from the log; None if the log has no data for one."""
    return {
        "loss": curves.loss_figure,
        **{name: partial(curves.metric_figure, metric=metric) for name, metric in METRICS.items()},
        "reward_margin": curves.reward_margin_figure,
        "reward_accuracy": curves.reward_accuracy_figure,
        "gates": gates.gate_figure,
        "gates_by_layer": gates.layer_figure,
        "learning_rate": curves.learning_rate_figure,
        "gradient_norm": curves.gradient_norm_figure,
        "throughput": curves.throughput_figure,
        "memory": curves.memory_figure,
    }


def _save_answers(run: RunFolder, path: Path) -> Path:
    """Draw the grid of answers, the slowest figure, unless it is newer than the answers."""
    if path.is_file() and path.stat().st_mtime > (run.folder / PREDICTIONS_FILE).stat().st_mtime:
        return path
    return _save(answers_figure(run.predictions, *ANSWERS_SHAPE), path)


def _save(figure: Figure, path: Path) -> Path:
    with atomic.file_in_place(path) as place, warnings.catch_warnings():
        # a character that the font lacks is drawn as an empty box
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(place, dpi=DPI, format="png")
    return path
