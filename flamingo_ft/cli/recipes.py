"""`flamingo-ft recipes`: the packaged recipes, every key there is, and a starting recipe for somebody's own data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flamingo_ft.errors import UserError

recipes_app = typer.Typer(
    help="List, show or copy packaged recipes, write one for your data, and look up keys."
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A packaged recipe's name.")]


@recipes_app.callback(invoke_without_command=True)
def _recipes(context: typer.Context) -> None:
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
    name: Name, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to.")] = Path(".")
) -> None:
    """Copy a packaged recipe and its data, to edit it."""
    from flamingo_ft.config import library

    for path in library.copy_recipe(name, folder):
        typer.echo(path)


@recipes_app.command("keys")
def list_keys(
    prefix: Annotated[
        str | None, typer.Argument(metavar="PREFIX", help="Only keys that begin with it, such as train.dpo.")
    ] = None,
) -> None:
    """Describe every key of a recipe: its type, default and meaning."""
    from rich.console import Console

    from flamingo_ft.config.keys import recipe_keys

    from .key_list import print_keys

    print_keys(recipe_keys(prefix), Console(highlight=False))


@recipes_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a recipe, for editors: save it beside your recipes as recipe.schema.json."""
    from flamingo_ft.config.keys import schema_text

    typer.echo(schema_text(), nl=False)


@recipes_app.command("new")
def new_recipe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write, which must not exist.")],
    data: Annotated[
        Path, typer.Option(metavar="PATH", help="Training data: a file, a pattern of files, or a folder.")
    ],
    eval_data: Annotated[
        Path | None,
        typer.Option("--eval", metavar="PATH", help="Evaluation data; by default some rows are held out."),
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
            "--format", metavar="NAME", help="Schema of the rows, if not recognised (vqa, caption, ...)."
        ),
    ] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN", help="Column that holds a field, such as answer=label; once per field."
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Language model: nano, a Hub name or a folder. By default nano."),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Vision tower. By default nano, or ViT-L-14 beside another language model."
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="OpenCLIP's tag of the tower's weights.")
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of the run, by default runs/ and the recipe's name."),
    ] = None,
) -> None:
    """Write a starting recipe that fits your data, with a reason for each value. Nothing is downloaded."""
    from flamingo_ft.check.new_recipe import RecipeOptions, write_new_recipe

    wishes = RecipeOptions(
        data, eval_data, image_root, format_, _columns(column or ()), language, vision, pretrained, output_dir
    )
    for note in write_new_recipe(file, wishes):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {file}; look at it, then: flamingo-ft check {shlex.quote(str(file))}")


def _columns(given: list[str] | tuple[()]) -> dict[str, str]:
    columns = {}
    for one in given:
        name, equals, column = one.partition("=")
        if not (name and equals and column):
            raise UserError(f"--column {one}: want FIELD=COLUMN, such as answer=label")
        columns[name] = column
    return columns
