"""The command `train`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_ft.cli.arguments import Overrides, Recipe
from flamingo_ft.errors import UserError

if TYPE_CHECKING:
    from flamingo_ft.config import Recipe as RecipeValues
    from flamingo_ft.data import OpenedData


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Move an earlier run in train.output_dir aside and start again."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the run from its last checkpoint; with more steps or epochs, extend it.",
        ),
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Try every part of the run, and every stage, in seconds on this machine: 2 steps with small "
            "stand-ins for backbones and for data that is not here; downloads nothing, keeps nothing.",
        ),
    ] = False,
) -> None:
    """Train as RECIPE describes, stage by stage, evaluate, and save an adapter."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe

    if overwrite and resume:
        raise UserError(
            "got --overwrite and --resume, but one starts again and the other continues; use one of them"
        )
    if smoke and (overwrite or resume):
        raise UserError("got --smoke, whose run is removed, with --overwrite or --resume; leave them out")
    if smoke and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("got --smoke, which is one process, in several; start it without a launcher")
    path = find_recipe(recipe)
    if smoke:
        settings = load_recipe(path, overrides or (), require=())
        with _trial(settings) as settings:
            _run(path, settings, overwrite, resume)
        return
    settings = load_recipe(path, overrides or ())
    from flamingo_ft.hub.errors import HubUnreachableError

    try:
        _run(path, settings, overwrite, resume)
    except HubUnreachableError as error:
        raise UserError(f"{error}; to try the recipe without one, add --smoke") from error
    if is_main_process():
        from flamingo_ft.adapters.trained_on import generate_options
        from flamingo_ft.report.run_folder import REPORT_FILE

        folder = settings.train.output_dir
        if (folder / REPORT_FILE).is_file():
            typer.echo(f"report in {folder / REPORT_FILE}")
        typer.echo(f"adapter in {folder}; try it: flamingo-ft generate {folder} {generate_options(folder)}")


@contextmanager
def _trial(recipe: RecipeValues) -> Generator[RecipeValues]:
    """Yield the recipe of a trial run, whose folder is removed, and print what stands in for what."""
    with tempfile.TemporaryDirectory(prefix="flamingo_ft_smoke_") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
        from flamingo_ft.training.trial import Trial

        trial = Trial(recipe, Path(folder))
        for line in trial.stand_ins:
            typer.echo(f"smoke: {line}", err=True)
        yield trial.recipe
        for line in trial.missing:
            typer.echo(f"smoke: {line}", err=True)
        typer.echo("smoke: the trial run finished; nothing of it was kept", err=True)


def _run(path: Path, settings: RecipeValues, overwrite: bool, resume: bool) -> None:
    """Train as the recipe says, and print the results."""
    from flamingo_ft.training.output_dir import prepare_output_dir, refuse_lost_run, undo_start

    folder, earlier = settings.train.output_dir, None
    if resume:
        refuse_lost_run(path, settings.train)
    elif is_main_process():
        earlier = prepare_output_dir(folder, overwrite=overwrite)
        if earlier:
            typer.echo(
                f"moved the earlier run to {earlier}; what started from it looks for it in {folder}", err=True
            )

    from flamingo_ft.cli.metrics_table import print_metrics
    from flamingo_ft.cli.output import log
    from flamingo_ft.training.train import train as run_training

    try:
        metrics = run_training(settings, print_sources, resume=resume, log=log)
    except UserError:
        if not resume and is_main_process() and undo_start(folder, earlier) and earlier:
            typer.echo(f"moved the earlier run back to {folder}", err=True)
        raise
    if is_main_process():
        print_metrics(metrics)


def is_main_process() -> bool:
    """Whether the launcher started this as the process of rank 0; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def print_sources(data: OpenedData) -> None:
    """Print name, size and format of each source on stderr, and the text columns that its format ignores."""
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for weighted in sources:
            source = weighted.source
            rows = f"{weighted.size:,} rows" if source.indexed else "streamed"
            typer.echo(f"{source.name} ({split}): {rows} of format {source.format}", err=True)
            if source.unread:
                unread = ", ".join(source.unread)
                typer.echo(
                    f"{source.name}: columns of text that the format does not read: {unread}", err=True
                )
