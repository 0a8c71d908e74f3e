"""Commands about a recipe, without training: `plan`, `check`, and those under `flamingo-ft recipes`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_ft.cli.arguments import Overrides, Pretrained, Recipe
from flamingo_ft.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from flamingo_ft.config.keys import RecipeKey

KEY_INDENT = 4

recipes_app = typer.Typer(
    help="List, show or copy packaged recipes, write one for your data, and look up keys."
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a packaged recipe.")]


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
    """Estimate the memory that RECIPE needs, the GPUs it fits on, and what to change.

    No weights are downloaded.
    """
    from flamingo_ft.config import load_recipe
    from flamingo_ft.config.library import find_recipe

    settings = load_recipe(find_recipe(recipe), overrides or (), require=("backbones",))

    from flamingo_ft.cli.recipe_tables import print_plan
    from flamingo_ft.plan.plan_report import make_plan_report
    from flamingo_ft.plan.stage_plans import make_stage_plans

    make_report = make_stage_plans if settings.stages else make_plan_report
    print_plan(make_report(settings, text_tokens, images).record(), as_json)


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the report, by default runs/check_RECIPE, of a run's own recipe "
            "runs/check_RUN_resolved_recipe.",
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Also measure whether the frozen vision tower can tell the answers apart, with classifiers "
            "on its tokens (loads the tower, not the language model); train's verdict uses the result.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read all data of RECIPE, without any weights, and report every row and image that cannot be used.

    With --probe, the result is written to probe.json in the report's folder and in train.output_dir.
    """
    from flamingo_ft.config import RECIPE_FILE, load_recipe
    from flamingo_ft.config.library import find_recipe

    path = find_recipe(recipe)
    settings = load_recipe(path, overrides or (), require=("data", "backbones"))
    # The recipes of all runs have the same name.
    name = f"{path.absolute().parent.name}_{path.stem}" if path.name == RECIPE_FILE else path.stem
    folder = out or Path("runs") / f"check_{name}"

    from flamingo_ft.check.stages import check_recipe
    from flamingo_ft.cli.recipe_tables import print_findings

    objections = []
    for place, report in check_recipe(settings, name, folder, probe):
        findings = report.record()
        print_findings(findings, as_json, place)
        if findings["probe"]:
            _keep_probe(place, settings.train.output_dir)
        if objection := findings["objection"] or findings["probe_error"]:
            objections.append(objection)
    if objections:
        raise UserError("\n".join(objections))


def _keep_probe(folder: Path, output_dir: Path) -> None:
    from flamingo_ft.cli.output import log
    from flamingo_ft.config import PROBE_FILE
    from flamingo_ft.training.output_dir import keep_probe

    if keep_probe(folder / PROBE_FILE, output_dir):
        log(
            f"probe in {output_dir / PROBE_FILE}, where the verdict and report of the next run find it, "
            "and those of runs in folders beside it"
        )
    else:
        log(f"{output_dir} holds other files; copy {folder / PROBE_FILE} to the run's folder for its verdict")


@recipes_app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes() -> None:
    """List the packaged recipes."""
    from rich.console import Console
    from rich.table import Table

    from flamingo_ft.config.library import packaged_recipes, summary

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, path in packaged_recipes().items():
        table.add_row(name, summary(path))
    Console().print(table)


@recipes_app.command("show")
def show_recipe(name: Name) -> None:
    """Print a packaged recipe."""
    from flamingo_ft.config.library import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: Name, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Target folder.")] = Path(".")
) -> None:
    """Copy a packaged recipe and its data, to edit it."""
    from flamingo_ft.config import library

    for path in library.copy_recipe(name, folder):
        typer.echo(path)


@recipes_app.command("keys")
def list_keys(
    prefix: Annotated[
        str | None, typer.Argument(metavar="PREFIX", help="Only keys with this prefix, such as train.dpo.")
    ] = None,
    as_markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print recipes/README.md: all recipes and all keys, as Markdown."),
    ] = False,
) -> None:
    """Document every key of a recipe: type, default and what it does."""
    from rich.console import Console

    from flamingo_ft.config.keys import markdown, recipe_keys

    if as_markdown:
        if prefix is not None:
            raise UserError(
                f"recipes keys: got the prefix {prefix} with --markdown, which prints all keys; remove it"
            )
        typer.echo(markdown(), nl=False)
        return
    print_keys(recipe_keys(prefix), Console(highlight=False))


@recipes_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a recipe, for editors: save it beside your recipes as recipe.schema.json."""
    from flamingo_ft.config.keys import schema_text

    typer.echo(schema_text(), nl=False)


@recipes_app.command("new")
def new_recipe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe to write; it must not exist.")],
    data: Annotated[
        Path, typer.Option(metavar="PATH", help="Training data: a file, a pattern of files, or a folder.")
    ],
    eval_data: Annotated[
        Path | None,
        typer.Option(
            "--eval", metavar="PATH", help="Evaluation data. By default a fraction of the training data."
        ),
    ] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the images, if it is not found near the data.", exists=True
        ),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="Format of the rows (vqa, caption, ...), if not recognised."
        ),
    ] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            help="Column of a field, such as answer=label; repeat it for several fields.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Language model: nano (default), a name on the Hub, or a folder."),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Vision tower. By default nano, or ViT-L-14 for another language model."
        ),
    ] = None,
    pretrained: Pretrained = None,
    output_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="train.output_dir, by default runs/ and the recipe's name."),
    ] = None,
) -> None:
    """Write a recipe that fits your data, with a reason for each value. Nothing is downloaded."""
    from flamingo_ft.check.new_recipe import RecipeOptions, write_new_recipe

    options = RecipeOptions(
        data, eval_data, image_root, format_, _columns(column or ()), language, vision, pretrained, output_dir
    )
    for note in write_new_recipe(file, options):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {file}, and beside it a schema for editors; look at it, then:")
    typer.echo(f"flamingo-ft check {shlex.quote(str(file))}")


def _columns(options: Sequence[str]) -> dict[str, str]:
    """Parse FIELD=COLUMN options."""
    columns = {}
    for option in options:
        field, equals, column = option.partition("=")
        if not (field and equals and column):
            raise UserError(f"--column {option}: must be FIELD=COLUMN, such as answer=label")
        columns[field] = column
    return columns


def print_keys(keys: Sequence[RecipeKey], console: Console) -> None:
    """Print two lines per key: name, type and default; then what it does.

    Lines are wrapped only on a terminal.
    """
    from rich.padding import Padding
    from rich.text import Text

    for key in keys:
        head = Text.assemble((key.name, "bold"), "  ", (f"{key.type}, {key.default_text}", "dim"))
        if console.is_terminal:
            console.print(head)
            console.print(Padding(Text(key.description), (0, 0, 0, KEY_INDENT)))
        else:
            console.print(head, soft_wrap=True)
            console.print(Text(" " * KEY_INDENT + key.description), soft_wrap=True)
