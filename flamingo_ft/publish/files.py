"""Which files of a folder belong to an adapter or a model, as they are shown to everybody: without places of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from flamingo_ft.adapters.card import CARD, card_text
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.evaluation.results import PREDICTIONS_FILE
from flamingo_ft.hub.places import without_places

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Of a run's figures not the one that shows samples: its images are the user's.
BELONGING = (
    *WEIGHTS, "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "*.py", "README.md", RECIPE_FILE,
    PREDICTIONS_FILE, "log.jsonl", "figures/*.png",
)  # fmt: skip
NOT_BELONGING = ("figures/answers.png", "*/*/*", ".*", "*/.*")
# Large, and read or written by tokenizers alone.
AS_IT_IS = ("tokenizer.json", "vocab.json", "*.index.json")
PLACES_IN_PREDICTIONS = ("where", "images")


def belongs(path: str) -> bool:
    """Whether a file, by its path in a folder, is of the adapter or the model there, and not of what else a run leaves."""
    return any(fnmatch(path, one) for one in BELONGING) and not any(fnmatch(path, one) for one in NOT_BELONGING)


def is_weights(path: str) -> bool:
    """Whether a loader would take the file for weights, beside others or in their place."""
    return "/" not in path and any(fnmatch(path, one) for one in WEIGHTS)


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """Path -> content, or the file itself where nothing in it is to be left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: _shown(name, path) for name, path in named.items() if belongs(name)}


def with_card(folder: Path, repository: str, license: str | None = None) -> dict[str, bytes | Path]:
    """The same with a card of what lies there, under its name on the Hub."""
    return files_of(folder) | {CARD: card_text(folder, repository, license).encode()}


def json_bytes(values: Any) -> bytes:
    """As the package and transformers write their files."""
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _shown(name: str, path: Path) -> bytes | Path:
    rewrite = _rewriting(name)
    return path if rewrite is None else rewrite(path.read_text(encoding="utf-8"))


def _rewriting(name: str) -> Callable[[str], bytes] | None:
    if any(fnmatch(name, one) for one in AS_IT_IS):
        return None
    if name == PREDICTIONS_FILE:
        return lambda text: b"".join(_prediction(line) for line in text.splitlines())
    if name.endswith(".json"):
        return lambda text: json_bytes(without_places(json.loads(text)))
    if name.endswith(".yaml"):
        return lambda text: yaml.safe_dump(
            without_places(yaml.safe_load(text)), sort_keys=False, allow_unicode=True
        ).encode()
    return None


def _prediction(line: str) -> bytes:
    """A line of predictions with the names alone of its file and images; what was asked and answered stays."""
    row = json.loads(line)
    shown = {key: _names(row[key]) for key in PLACES_IN_PREDICTIONS if key in row}
    return (json.dumps(row | shown, ensure_ascii=False) + "\n").encode()


def _names(value: str | Iterable[Any]) -> Any:
    if not isinstance(value, str):
        return [_names(one) if isinstance(one, str) else one for one in value]
    return re.sub(r"^(/|~)[^:\n]*/", "", value)
