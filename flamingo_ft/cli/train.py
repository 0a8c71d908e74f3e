"""The command `train`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_ft.cli.arguments import Overrides, Recipe
from flamingo_ft.errors import UserError

if TYPE_CHECKING:
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
) -> None:
    """Train as RECIPE describes, evaluate, and save an adapter."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe
    from flamingo_ft.training.output_dir import prepare_output_dir, refuse_lost_run

    if overwrite and resume:
        raise UserError(
            "got --overwrite and --resume, but one starts again and the other continues; use one of them"
        )
    path = find_recipe(recipe)
    settings = load_recipe(path, overrides or ())
    folder = settings.train.output_dir
    if resume:
        refuse_lost_run(path, settings.train)
    elif is_main_process():
        earlier = prepare_output_dir(folder, overwrite=overwrite)
        if earlier:
            typer.echo(f"moved the earlier run to {earlier}", err=True)

    from flamingo_ft.cli.metrics_table import print_metrics
    from flamingo_ft.cli.output import log
    from flamingo_ft.training.train import train as run_training

    metrics = run_training(settings, print_sources, resume=resume, log=log)
    if is_main_process():
        print_metrics(metrics)
        typer.echo(f"adapter in {folder}; try it: flamingo-ft generate {folder} --image FILE --prompt TEXT")


def is_main_process() -> bool:
    """Whether the launcher started this as the process of rank 0; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def print_sources(data: OpenedData) -> None:
    """Print name, size and format of each source on stderr, and the text columns that its format ignores."""
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for weighted in sources:
            source = weighted.source
            rows = f"{weighted.size:,} rows" if source.indexed else "streamed"
            typer.echo(f"{source.name} ({split}): {rows} of schema {source.format}", err=True)
            if source.unread:
                unread = ", ".join(source.unread)
                typer.echo(
                    f"{source.name}: columns of text that the schema does not read: {unread}", err=True
                )
