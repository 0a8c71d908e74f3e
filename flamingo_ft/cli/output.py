"""How commands print: messages on stderr, results as tables or JSON on stdout."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.table import Table


def log(line: str) -> None:
    """Print a message, beside what the command prints as its result."""
    typer.echo(line, err=True)


class _Lines(logging.Handler):
    """Prints each record as a message."""

    def emit(self, record: logging.LogRecord) -> None:
        log(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def package_log_as_lines() -> Generator[None]:
    """Print what the package logs inside the context as one line each, whatever other libraries set up."""
    logger, handler = logging.getLogger("flamingo_ft"), _Lines()
    logger.addHandler(handler)
    was_propagated, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = was_propagated
        logger.removeHandler(handler)


def print_json(record: Mapping[str, Any]) -> None:
    """Print a record as indented JSON."""
    typer.echo(json.dumps(record, indent=2))


def titled_table(title: str) -> Table:
    """Return an empty table without vertical lines."""
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
