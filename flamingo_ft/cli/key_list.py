"""The keys of a recipe, as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from flamingo_ft.config.keys import RecipeKey

INDENT = 4


def print_keys(keys: Sequence[RecipeKey], console: Console) -> None:
    """Two lines a key: name, type and default; then what it does. Wrapped on a terminal, and nowhere else."""
    for key in keys:
        head = Text.assemble((key.name, "bold"), "  ", (f"{key.type}, {_default(key)}", "dim"))
        if console.is_terminal:
            console.print(head)
            console.print(Padding(Text(key.description), (0, 0, 0, INDENT)))
        else:
            console.print(head, soft_wrap=True)
            console.print(Text(" " * INDENT + key.description), soft_wrap=True)


def _default(key: RecipeKey) -> str:
    if key.default is None:
        return "required"
    return "all keys optional" if key.default == "see its keys" else f"default {key.default}"
