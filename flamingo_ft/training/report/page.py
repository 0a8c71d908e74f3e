"""report.html: one page that needs nothing beside it, neither files nor network nor scripts."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flamingo_ft import __version__, atomic

from .folder import RunFolder
from .pictures import save_figures

REPORT_FILE = "report.html"
REFRESH_SECONDS = 30  # between two looks of a browser at the page of a run that goes on


def write_report(folder: str | Path, *, goes_on: bool = False, stopped: str | None = None) -> Path:
    """Draw a run's figures and write its page, from the files in its folder alone.

    goes_on: the page looks for its next version by itself. stopped: by what, where the run ended before its end.
    Returns the page's path. UserError where the folder holds no run.
    """
    run = RunFolder.read(Path(folder))
    pictures = {name: _data_uri(path) for name, path in save_figures(run).items()}
    loader = PackageLoader("flamingo_ft.training.report", "")
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, **blocks)
    page = environment.get_template("report.html.jinja").render(
        version=__version__,
        run=run,
        status=status(run, goes_on, stopped),
        refresh=REFRESH_SECONDS if goes_on else None,
        pictures=pictures,
        accuracy=accuracy_table(run.metrics.get("eval") or {}),
        percent=lambda share: "" if share is None else f"{100 * share:.1f} %",
        clock=clock,
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


def accuracy_table(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracies in 0..1: {"columns": headers, "rows": {task: (samples, *accuracies)}, "all": likewise}."""
    if not evaluation:
        return None
    columns = {"before": "before", "after": "accuracy", "with another image": "shuffled_images"}
    overall = {"before": "accuracy_before", "accuracy": "accuracy", "shuffled_images": "accuracy_shuffled_images"}
    measured = {header: key for header, key in columns.items() if evaluation.get(overall[key]) is not None}
    tasks = evaluation["per_task"]
    rows = {name: (task["samples"], *(task.get(key) for key in measured.values())) for name, task in tasks.items()}
    total = sum(task["samples"] for task in tasks.values())
    return {
        "columns": [*measured],
        "rows": rows,
        "all": (total, *(evaluation[overall[key]] for key in measured.values())),
    }


def clock(seconds: float | None) -> str:
    """1 h 2 min, 3 min 20 s or 45 s."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
