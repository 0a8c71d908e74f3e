"""Variants of a model compared on the same questions, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flamingo_ft.adapters.card import TextTable
from flamingo_ft.cli.output import titled_table
from flamingo_ft.evaluation.variant_tables import variant_tables, verdicts

UNLIMITED = 10_000  # columns of a terminal
NOTE = (
    "in parentheses: 95 % bootstrap intervals\n"
    "difference: from the first row, paired by question; of percentages, in points\n"
    "another image, gray image (--controls): scores with these in place of the question's own"
)


def print_variants(variants: Sequence[Mapping[str, Any]]) -> None:
    """Print the records of `compare_variants`."""
    console = Console()
    for table in variant_tables(variants):
        printed = _printed(table)
        if (
            console.measure(printed, options=console.options.update(max_width=UNLIMITED)).maximum
            > console.width
        ):
            printed = _printed(table, narrow=True)
        console.print(printed)
    typer.echo(NOTE)
    for line in verdicts(variants):
        typer.echo(line)


def _printed(table: TextTable, narrow: bool = False) -> Table:
    """Return a table for the terminal; in a narrow one, intervals are below their values."""
    printed = titled_table(table.title)
    first, *others = table.columns
    printed.add_column(first, overflow="fold")
    for column in others:
        short = column.removeprefix("with ").removeprefix("a ").replace(" ", "\n")
        printed.add_column(short, justify="right", no_wrap=True)
    for name, *cells in table.rows:
        cells = [cell.replace(" (", "\n(") if narrow else cell for cell in cells]
        printed.add_row(*map(Text, [name, *cells]))  # a name in square brackets is not markup
    return printed
