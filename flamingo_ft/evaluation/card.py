"""The card (README.md) of an adapter or a merged model with the scores that are in its folder.

`push` and `eval --card` write the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.adapters.card import CARD, COMPARISON_FILE, card_text
from flamingo_ft.adapters.remote_code import WITHOUT_THE_PACKAGE
from flamingo_ft.config import METRICS_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.hub.names import hub_name

from .results import card_tables
from .run_tables import run_tables
from .variant_tables import variant_tables
from .variants import NAMES

EVALUATED = "this model"  # in the card, whatever its folder is called


def scored_card(folder: Path, repository: str | None = None, license: str | None = None) -> str:
    """Return the card of the model in ``folder``. repository: its name on the Hub, if it is pushed."""
    path = folder / METRICS_FILE
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scores, others = card_tables(metrics.get("eval")), run_tables(metrics)
    text = card_text(folder, repository, license, tables=scores, run_tables=others)
    if any(folder.glob("*.py")):
        text += WITHOUT_THE_PACKAGE.replace("this/folder", repository or "this/folder")
    return text


def check_has_card(model: str | Path) -> None:
    """Raise UserError for a model on the Hub, whose card is not on this machine."""
    if hub_name(model) is not None:
        raise UserError(f"--card: {model} is on the Hub; evaluate a folder with it, and push that")


def write_comparison(folder: Path, evaluated_on: str, variants: Sequence[Mapping[str, Any]]) -> None:
    """Write the scores of variants into the card of the first, in place of those on the same questions.

    evaluated_on: what the questions are from. variants: records of `compare_variants`.
    """
    path = folder / COMPARISON_FILE
    comparisons = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = [dict(record, name=_name_in_card(record["name"])) for record in variants]
    named[0]["name"] = EVALUATED
    comparisons[evaluated_on] = [asdict(table) for table in variant_tables(named)]
    atomic.write_text(path, json.dumps(comparisons, indent=2, ensure_ascii=False) + "\n")
    atomic.write_text(folder / CARD, scored_card(folder))


def _name_in_card(name: str) -> str:
    """Return the name of a variant without the folders above it."""
    return name if name in NAMES or hub_name(name) is not None else Path(name).expanduser().resolve().name
