"""Whether a recipe needs the Hub, which tests do not have."""

from __future__ import annotations

from pathlib import Path

import yaml

from flamingo_ft.hub import hub_name


def needs_the_hub(recipe: Path) -> bool:
    """Whether its language model has the name of a repository on the Hub."""
    return (
        hub_name(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["language"]["name"]) is not None
    )
