"""report.html, one page that needs no other files, network or scripts, and the images in figures/.

It is written during a run, and once more when the run ends, however it ends.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import atomic, processes
from flamingo_ft.config import PREDICTIONS_FILE, RECIPE_FILE
from flamingo_ft.errors import StoppedBySignal
from flamingo_ft.evaluation.image_loss_gap import LOG_KEY, ImageLossGap
from flamingo_ft.evaluation.image_use import NO_USE, NOT_LOOKING, READS_IMAGES
from flamingo_ft.evaluation.loss_by_kind import TEXT_ONLY, log_key
from flamingo_ft.evaluation.metrics import ACCURACY, Metric
from flamingo_ft.evaluation.pair_rewards import MARGIN_KEY, RANKED_KEY
from flamingo_ft.evaluation.probe_verdict import BLIND, LEARN_FASTER, tower_lines
from flamingo_ft.evaluation.results import COLUMN_HEADERS, class_scores, score_tables
from flamingo_ft.evaluation.run_tables import run_tables
from flamingo_ft.evaluation.select_metrics import known_metrics
from flamingo_ft.formatting import data_uri, duration, percent, significant
from flamingo_ft.templates import load_template
from flamingo_ft.version import __version__

from . import curves, gates
from .run_folder import REPORT_FILE, Entry, RunFolder
from .sample_grid import answers_figure
from .stages import mark_stages

FIGURES_FOLDER = "figures"
DPI = 130  # dots per inch
ANSWERS, ANSWERS_SHAPE = "answers", (3, 4)  # name of that figure; rows and columns of questions
REFRESH_SECONDS = 30  # interval at which a browser reloads the page of a run in progress
MIN_INTERVAL = 30  # seconds between two reports of a run in progress
COST_FACTOR = 20  # after a report that took one second, wait 20: at most 5 % of the time
LOSS_CAPTIONS = {
    "sft": "Cross-entropy of the reference answers: how surprised the model is by them.",
    "dpo": "The preference loss (sigmoid: 0.69 for no preference, towards 0 as the chosen answers win).",
    "kto": "The loss of good and bad answers: 0.5 at first, towards 0 as good ones become more probable.",
    "grpo": "In training the policy loss, which stays near 0 (see the reward); on held-out samples the "
    "cross-entropy of the reference answers.",
}
METHOD_NAMES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Preferences (DPO)",
    "kto": "Labelled answers (KTO)",
    "grpo": "Sampled answers with a reward (GRPO)",
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
    metrics, tables = known_metrics(run.recipe.eval), score_tables(run.evaluation)
    of_classes = [table.metric for table in tables if table.metric.by_class]
    page = template.render(
        version=__version__,
        run=run,
        status=status(run, in_progress, stopped_by),
        refresh=REFRESH_SECONDS if in_progress else None,
        facts=facts(run),
        figures=figures,
        metrics=metrics,
        tables=tables,
        run_tables=run_tables(run.metrics),
        headers=COLUMN_HEADERS,
        class_metrics=of_classes,
        classes=class_scores(run.evaluation, of_classes),
        free_text=[name for name, task in tasks.items() if task.get("free_text")],
        shows_accuracy=ACCURACY.name in run.evaluation,
        verdict=verdict,
        verdict_kind=_verdict_kind(verdict),
        probe=run.probe.record() if run.probe else None,
        probe_lines=list(tower_lines(run.probe)) if run.probe else [],
        method_name=METHOD_NAMES[run.recipe.train.method],
        loss_caption=LOSS_CAPTIONS[run.recipe.train.method],
        gap_caption=image_loss_gap_caption(run),
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
    has_remedy = LEARN_FASTER in verdict or BLIND in verdict
    return "good" if verdict.startswith(f"{READS_IMAGES}:") and not has_remedy else "warn"


def image_loss_gap_caption(run: RunFolder) -> str:
    """Return what the curve of the image loss gap means, and what its newest value says."""
    gaps = ((entry["step"], ImageLossGap.of_log(entry)) for entry in reversed(run.entries))
    step, newest = next((found for found in gaps if found[1] is not None), (0, None))
    meaning = (
        "How much the held-out loss rises with another image (that of another sample), and a band of three "
        "standard errors: 0 means that the answers are predicted without looking."
    )
    if newest is None or newest.conclusion is None:
        return meaning
    return f"{meaning} At step {step:,}: {newest.text}, {newest.conclusion}."


def facts(run: RunFolder) -> dict[str, str]:
    """Return the numbers at the head of the report, as name -> text, using the latest log values."""
    values = {}
    if run.training:
        values["trainable parameters"] = f"{run.training['trainable_parameters']:,}"
    if run.seconds is not None:
        values["training time"] = duration(run.seconds)
    for name, key, write in _logged_facts(known_metrics(run.recipe.eval)):
        value = run.last(key)
        if value is not None:
            values[name] = write(value)
    if "best" in run.training:
        values["best evaluation"] = f"step {run.training['best']['step']:,}"
    return values


def _logged_facts(metrics: Sequence[Metric]) -> list[tuple[str, str, Callable[[float], str]]]:
    """Name, key in the log, and how the value is written."""
    return [
        ("loss", "loss", "{:.4g}".format),
        ("held-out loss", "eval_loss", "{:.4g}".format),
        ("with another image", LOG_KEY, "{:+.3g}".format),
        ("held-out loss, text only", log_key(TEXT_ONLY), "{:.4g}".format),
        *((f"held-out {metric.label}", f"eval_{metric.name}", metric.text) for metric in metrics),
        ("reward", "reward", "{:.3g}".format),
        ("held-out pairs ranked correctly", RANKED_KEY, percent),
        ("held-out reward margin", MARGIN_KEY, "{:.3g}".format),
        ("training pairs ranked correctly", "rewards/accuracies", percent),
        ("training reward margin", "rewards/margins", "{:.3g}".format),
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
    for name, draw in _log_figures(known_metrics(run.recipe.eval)).items():
        figure = draw(run.entries)
        if figure is not None:
            mark_stages(figure, run.stage_starts)
            paths[name] = _save(figure, folder / f"{name}.png")
    if run.predictions:
        paths[ANSWERS] = _save_answers(run, folder / f"{ANSWERS}.png")
    return paths


def _log_figures(metrics: Sequence[Metric]) -> dict[str, Callable[[Sequence[Entry]], Figure | None]]:
    """Figures drawn from the log; None if the log has no data for one."""
    return {
        "loss": curves.loss_figure,
        **{metric.name: partial(curves.metric_figure, metric=metric) for metric in metrics},
        "reward": curves.reward_figure,
        "reward_margin": curves.reward_margin_figure,
        "reward_accuracy": curves.reward_accuracy_figure,
        "loss_by_kind": curves.loss_by_kind_figure,
        "image_loss_gap": curves.image_loss_gap_figure,
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


# --- during a run and at its end ---


class LiveReport(TrainerCallback):
    """Write the report at log entries, at most every 30 seconds and for at most 5 % of the time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.next_time = time.monotonic() + MIN_INTERVAL

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        began = time.monotonic()
        if state.is_world_process_zero and began >= self.next_time:
            try_report(self.folder, in_progress=True)
            ended = time.monotonic()
            self.next_time = ended + max(MIN_INTERVAL, COST_FACTOR * (ended - began))


@contextmanager
def final_report(folder: Path) -> Generator[None]:
    """Write the report when the block ends or raises, if a run has begun in the folder."""
    try:
        yield
    except BaseException as error:  # interrupts too: the page says what ended the run; raised again below
        _report_at_end(folder, stopped_by=reason(error))
        raise
    _report_at_end(folder)


def reason(error: BaseException) -> str:
    """Return in one line what ended a run."""
    if isinstance(error, StoppedBySignal):
        return signal.Signals(error.number).name
    return f"an error: {str(error) or type(error).__name__}".splitlines()[0]


def try_report(folder: Path, **options: Any) -> None:
    """Write the report; if that fails, warn and let the run continue."""
    try:
        write_report(folder, **options)
    except Exception as error:  # whatever is wrong with a figure or file, it must not end the training
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"{folder}: the report could not be written: {problem}", stacklevel=2)


def _report_at_end(folder: Path, **options: Any) -> None:
    if processes.is_main() and (folder / RECIPE_FILE).is_file():
        try_report(folder, **options)
