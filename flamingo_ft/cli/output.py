"""How commands print: messages on stderr, results as tables or JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich import box
from rich.table import Table


def log(line: str) -> None:
    """Print a message, beside what the command prints as its result."""
    typer.echo(line, err=True)


def print_json(record: Mapping[str, Any]) -> None:
    """Print a record as indented JSON."""
    typer.echo(json.dumps(record, indent=2))


def titled_table(title: str) -> Table:
    """Return an empty table without vertical lines."""
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
