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
from flamingo_ft.adapters.code import WITHOUT_THE_PACKAGE
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.evaluation.merging import MERGE_FILE
from flamingo_ft.evaluation.results import PREDICTIONS_FILE
from flamingo_ft.hub.places import strip_local_path, strip_local_paths
from flamingo_ft.hub.weight_files import ANY_INDEX, ANY_SAFETENSORS

BELONGING = (
    *ANY_SAFETENSORS, "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "*.py", "README.md", RECIPE_FILE,
    PREDICTIONS_FILE, "log.jsonl",
)  # fmt: skip
FIGURES, OF_SAMPLES = (
    re.compile(r"figures/\w+\.png"),
    "figures/answers.png",
)  # the images in the latter are the user's
# Their text is a model's vocabulary, where a slash is a slash.
AS_IT_IS = ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json", ANY_INDEX)
TOKENIZER = "tokenizer_config.json"
KEYS_OF_FILES = {
    MERGE_FILE: ("adapter",)
}  # where a path stands under a key that may mean something else elsewhere
PLACES_IN_PREDICTIONS = ("where", "images")


def belongs(path: str) -> bool:
    """Whether a file, by its path in a folder, is of the adapter or the model there, and not of what else a run leaves."""
    if "/" in path:
        return bool(FIGURES.fullmatch(path)) and path != OF_SAMPLES
    return any(fnmatch(path, one) for one in BELONGING) and not path.startswith(".")


def is_weights(path: str) -> bool:
    """Whether a loader would take the file for weights, beside others or in their place."""
    return "/" not in path and any(fnmatch(path, one) for one in ANY_SAFETENSORS)


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """Path -> content, or the file itself where nothing in it is to be left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: _shown(name, path) for name, path in named.items() if belongs(name)}


def with_card(folder: Path, repository: str, license: str | None = None) -> dict[str, bytes | Path]:
    """The same with a card of what lies there, under its name on the Hub."""
    files = files_of(folder)
    text = card_text(folder, repository, license)
    if any(name.endswith(".py") for name in files):
        text += WITHOUT_THE_PACKAGE.replace("this/folder", repository)
    return files | {CARD: text.encode()}


def json_bytes(values: Any) -> bytes:
    """As the package and transformers write their files."""
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _shown(name: str, path: Path) -> bytes | Path:
    rewrite = _rewriting(name)
    return path if rewrite is None else rewrite(path.read_text(encoding="utf-8"))


def _rewriting(name: str) -> Callable[[str], bytes] | None:
    if any(fnmatch(name, one) for one in AS_IT_IS):
        return None
    if name == TOKENIZER:
        return lambda text: json_bytes(_tokenizer(json.loads(text)))
    if name == PREDICTIONS_FILE:
        return lambda text: b"".join(_prediction(line) for line in text.split("\n") if line)
    if name.endswith(".json"):
        keys = KEYS_OF_FILES.get(name, ())
        return lambda text: json_bytes(strip_local_paths(json.loads(text), keys))
    if name == RECIPE_FILE:
        return lambda text: yaml.safe_dump(
            strip_recipe_paths(yaml.safe_load(text)), sort_keys=False, allow_unicode=True
        ).encode()
    return None


def _tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: strip_local_path(one) if key.endswith(("_path", "_file")) else one for key, one in values.items()
    }


def _prediction(line: str) -> bytes:
    """A line of predictions with the names alone of its file and images; what was asked and answered stays."""
    row = json.loads(line)
    shown = {key: _names(row[key]) for key in PLACES_IN_PREDICTIONS if key in row}
    return (json.dumps(row | shown, ensure_ascii=False) + "\n").encode()


def _names(value: str | Iterable[Any]) -> Any:
    if not isinstance(value, str):
        return [_names(one) if isinstance(one, str) else one for one in value]
    return re.sub(r"^(/|~)[^:\n]*/", "", value)
