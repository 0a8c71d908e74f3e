"""Verbs that look at a recipe or at this machine, without training: `plan`, `check` and `env`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_ft.cli.arguments import Overrides, Recipe


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Text tokens of the longest sample, instead of the data's."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Largest number of images in a sample, instead of the data's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, sizes in bytes.")] = False,
) -> None:
    """Estimate the memory that RECIPE needs, the GPUs it fits on, and what to change. No weights are
    downloaded."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe

    settings = load_recipe(find_recipe(recipe), overrides or (), require=("backbones",))

    from flamingo_ft.cli.plan_table import print_plan
    from flamingo_ft.plan.plan_report import make_plan_report

    print_plan(make_plan_report(settings, text_tokens, images).record(), as_json)


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the report, by default runs/check_RECIPE."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read all data of RECIPE, without any weights, and report every row and image that cannot be used."""
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe
    from flamingo_ft.errors import UserError

    path = find_recipe(recipe)
    settings = load_recipe(path, overrides or (), require=("data", "backbones"))
    folder = out or Path("runs") / f"check_{path.stem}"

    from flamingo_ft.check.check_data import check_data
    from flamingo_ft.cli.check_table import print_findings

    findings = check_data(settings, path.stem, folder).record()
    print_findings(findings, as_json, folder)
    if findings["objection"]:
        raise UserError(findings["objection"])


def env(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """Print versions, hardware and missing extras for a bug report, without anything private."""
    from flamingo_ft.cli import environment
    from flamingo_ft.cli.output import print_json

    record = environment.environment()
    if as_json:
        print_json(record)
    else:
        typer.echo(environment.as_text(record))
