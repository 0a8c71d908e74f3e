"""report.html: one page that needs nothing beside it, neither files nor network nor scripts."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flamingo_ft import atomic
from flamingo_ft.formatting import data_uri, duration, percent
from flamingo_ft.version import __version__

from .facts import accuracy_table, class_table, facts
from .folder import RunFolder
from .pictures import save_figures

REPORT_FILE = "report.html"
LOSS_CAPTIONS = {
    "sft": "Cross-entropy of the reference answers: how surprised the model is by them.",
    "dpo": "The preference loss (sigmoid: 0.69 for no preference, towards 0 as the chosen answers win).",
}
REFRESH_SECONDS = 30  # between two looks of a browser at the page of a run that goes on


def write_report(folder: str | Path, *, goes_on: bool = False, stopped: str | None = None) -> Path:
    """Draw a run's figures and write its page, from the files in its folder alone.

    goes_on: the page looks for its next version by itself. stopped: by what, where the run ended before its end.
    Returns the page's path. UserError where the folder holds no run.
    """
    run = RunFolder.read(Path(folder))
    pictures = {name: data_uri(path.read_bytes()) for name, path in save_figures(run).items()}
    loader = PackageLoader("flamingo_ft.report", "")
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, **blocks)
    page = environment.get_template("report.html.jinja").render(
        version=__version__,
        run=run,
        status=status(run, goes_on, stopped),
        refresh=REFRESH_SECONDS if goes_on else None,
        pictures=pictures,
        accuracy=accuracy_table(run.metrics.get("eval") or {}),
        classes=class_table(run.metrics.get("eval") or {}),
        free_text=[
            name
            for name, task in (run.metrics.get("eval") or {}).get("per_task", {}).items()
            if task.get("free_text")
        ],
        verdict=(run.metrics.get("eval") or {}).get("verdict"),
        facts=facts(run),
        loss_caption=LOSS_CAPTIONS[run.recipe.train.method],
        percent=percent,
        duration=duration,
    )
    atomic.write_text(run.folder / REPORT_FILE, page)
    return run.folder / REPORT_FILE


def status(run: RunFolder, goes_on: bool, stopped: str | None) -> tuple[str, str]:
    """How it stands, and its kind: good, warn or bad."""
    place = f"step {run.step:,} of {run.steps:,}"
    if run.finished:
        return f"finished after {run.metrics['train']['steps']:,} steps", "good"
    if stopped is not None:
        return f"stopped at {place} by {stopped}", "bad"
    return (f"training, {place}", "warn") if goes_on else (f"not finished, {place}", "bad")
