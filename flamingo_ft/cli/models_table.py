"""Variants of a model compared on the same questions, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flamingo_ft.adapters.card import ComparisonTable
from flamingo_ft.cli.output import titled_table
from flamingo_ft.evaluation.variant_tables import variant_tables, verdicts

NOTE = (
    "in parentheses: 95 % bootstrap intervals\n"
    "difference: from the first row, paired by question; of percentages, in points"
)


def print_variants(variants: Sequence[Mapping[str, Any]]) -> None:
    """Print the records of `compare_variants`."""
    for table in variant_tables(variants):
        Console().print(_printed(table))
    typer.echo(NOTE)
    for line in verdicts(variants):
        typer.echo(line)


def _printed(table: ComparisonTable) -> Table:
    printed = titled_table(table.title)
    first, *others = table.columns
    printed.add_column(first)
    for column in others:
        printed.add_column(column, justify="right")
    for row in table.rows:
        printed.add_row(*map(Text, row))  # a name in square brackets is not markup
    return printed
