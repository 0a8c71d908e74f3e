"""``flamingo-ft push``: push an adapter with its base, or a merged model, to repositories on the Hub.

Only files that belong to the adapter or the model are pushed, and none with a directory of this machine in
it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from flamingo_ft.adapters import write_composition
from flamingo_ft.adapters.card import CARD
from flamingo_ft.adapters.files import backbone_records, read_config, read_flamingo_config
from flamingo_ft.adapters.multi_adapter import check_same_base
from flamingo_ft.config import PREDICTIONS_FILE, RECIPE_FILE
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.card import scored_card
from flamingo_ft.evaluation.merging import MERGE_FILE, merge_adapter
from flamingo_ft.hub import existing_path, fetch_model
from flamingo_ft.hub.names import NAME, looks_like_path, strip_local_path, strip_local_paths
from flamingo_ft.hub.upload import create_repository, require_token, upload
from flamingo_ft.hub.weight_files import (
    ADAPTER_CONFIG,
    ANY_INDEX,
    ANY_SAFETENSORS,
    is_adapter,
    is_whole_model,
)
from flamingo_ft.model import FlamingoConfig

BASE_SUFFIX = "-base"
PUBLISHED_PATTERNS = (
    *ANY_SAFETENSORS, "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "*.py",
    "README.md", RECIPE_FILE, PREDICTIONS_FILE, "log.jsonl",
)  # fmt: skip
FIGURES = re.compile(r"figures/\w+\.png")
ANSWERS_FIGURE = "figures/answers.png"  # not published: it shows the user's images
# Never rewritten: in a vocabulary a slash is a slash.
VERBATIM = ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json", ANY_INDEX)
TOKENIZER_CONFIG = "tokenizer_config.json"
# Keys with a path in one file, which mean something else elsewhere.
PATH_KEYS_BY_FILE = {MERGE_FILE: ("adapter",)}
PATH_KEYS_OF_PREDICTIONS = ("where", "images")

Files = dict[str, bytes | Path]
Log = Callable[[str], None]


@dataclass(frozen=True)
class PushResult:
    """repository: name on the Hub; base: the adapter's composition, None for a model; url: of the commit."""

    repository: str
    base: str | None
    url: str


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    merged: bool = False,
    base: str | None = None,
    license: str | None = None,
    start: str | Path | None = None,
    log: Log = lambda line: None,
) -> PushResult:
    """Push the adapter or the model in ``folder``, each repository in one commit.

    Args:
        folder: of a run, an adapter or a merged model.
        private: whether new repositories are private.
        revision: branch to commit to.
        merged: merge an adapter first and push the merged model.
        base: a composition on the Hub to refer to, which is not written to; by default the adapter's own
            composition is pushed to ``repository`` with "-base" appended.
        license: for the card.
        start: where the bridge that the adapter builds on is now.
        log: called with a line for each step.

    Raises:
        UserError: ``folder`` holds neither, a name is invalid, ``base`` is another base, or the Hub refuses.
    """
    _check_names(repository, base)
    folder = existing_path(folder)
    is_an_adapter = _check_folder(folder, merged, base)
    require_token(repository)  # before backbones are loaded and models merged, which takes minutes
    if not is_an_adapter:
        create_repository(repository, private, revision)
        return _push_model(folder, repository, revision, license, log)
    if merged:
        create_repository(repository, private, revision)
        with tempfile.TemporaryDirectory() as scratch:
            log(f"merging {folder}")
            merge_adapter(folder, Path(scratch) / "merged", start=start)
            return _push_model(Path(scratch) / "merged", repository, revision, license, log)
    return _push_adapter(folder, repository, base, private, revision, license, start, log)


def _check_names(repository: str, base: str | None) -> None:
    for name in filter(None, (repository, base)):
        match = NAME.fullmatch(name)
        if match is None or match["revision"]:
            raise UserError(f"{name}: not the name of a repository; give org/name")


def _check_folder(folder: Path, merged: bool, base: str | None) -> bool:
    """Return whether a folder holds an adapter. Raises UserError if it holds no merged model either."""
    if is_adapter(folder):
        read_config(folder)
        if merged and base:
            raise UserError(f"got --merged and --base {base}; a merged model has no base: give one of them")
        return True
    if not is_whole_model(folder):
        raise UserError(
            f"{folder}: holds no adapter and no merged model; give the folder that a run or a merge wrote"
        )
    read_flamingo_config(folder)
    if merged or base:
        raise UserError(
            f"{folder}: is a merged model already; push it without {'--merged' if merged else '--base'}"
        )
    return False


def _push_model(
    folder: Path, repository: str, branch: str | None, license: str | None, log: Log
) -> PushResult:
    url = _commit(repository, files_to_push(folder, repository, license), branch, log)
    return PushResult(repository, None, url)


def _push_adapter(
    folder: Path,
    repository: str,
    shared_base: str | None,
    private: bool,
    branch: str | None,
    license: str | None,
    start: str | Path | None,
    log: Log,
) -> PushResult:
    """Push the base first, so that an adapter on the Hub can always be loaded."""
    base = shared_base or repository + BASE_SUFFIX
    config = read_config(folder)
    _log_local_backbones(folder, config, log)
    if shared_base:
        check_same_base(folder, read_flamingo_config(fetch_model(shared_base)), config)
        create_repository(repository, private, branch)
    else:
        _push_base(folder, base, repository, private, branch, start, log)
    files = files_to_push(folder, repository, license)
    adapter_config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    adapter_config = strip_local_paths(adapter_config) | {
        "base_model_name_or_path": base,
        "revision": None if shared_base else branch,  # PEFT's key for the revision of the base
    }
    files[ADAPTER_CONFIG] = _json_bytes(adapter_config)
    return PushResult(repository, base, _commit(repository, files, branch, log))


def _push_base(
    folder: Path,
    base: str,
    repository: str,
    private: bool,
    branch: str | None,
    start: str | Path | None,
    log: Log,
) -> None:
    """Write the adapter's composition and push it, once it is clear that the adapter may be pushed too."""
    with tempfile.TemporaryDirectory() as scratch:
        composition = Path(scratch) / "base"
        write_composition(folder, composition, start=start)
        for name in (base, repository):
            create_repository(name, private, branch)
        _commit(base, publishable_files(composition), branch, log)


def _commit(repository: str, files: Files, branch: str | None, log: Log) -> str:
    size = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    log(f"{repository}: {len(files)} files, {size / 1e6:,.1f} MB")
    return upload(repository, files, "Pushed with flamingo_ft", branch=branch, replaced=is_weights, log=log)


def _log_local_backbones(folder: Path, config: FlamingoConfig, log: Log) -> None:
    """Log which backbones are folders of this machine: nobody else can load an adapter of them."""
    for part, source in backbone_records(config).items():
        if looks_like_path(source["name"]):
            log(
                f"{folder}: its {part} backbone is a folder of this machine, which nobody else has; "
                "push that too and train with its name, or push with --merged"
            )


def files_to_push(folder: Path, repository: str, license: str | None = None) -> Files:
    """Return the publishable files of ``folder`` with a card that names ``repository``."""
    return publishable_files(folder) | {CARD: scored_card(folder, repository, license).encode()}


def publishable_files(folder: Path) -> Files:
    """Return path -> content of the files to publish; the file itself if nothing in it is left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: _without_local_paths(name, path) for name, path in named.items() if is_published(name)}


def is_published(path: str) -> bool:
    """Return whether a file, by its path in a folder, is part of an adapter or a model."""
    if "/" in path:
        return FIGURES.fullmatch(path) is not None and path != ANSWERS_FIGURE
    return any(fnmatch(path, pattern) for pattern in PUBLISHED_PATTERNS) and not path.startswith(".")


def is_weights(path: str) -> bool:
    """Return whether a loader would read the file as weights, beside others or in their place."""
    return "/" not in path and any(fnmatch(path, pattern) for pattern in ANY_SAFETENSORS)


def _without_local_paths(name: str, path: Path) -> bytes | Path:
    """Return a file's content without directories of this machine; the file itself if none are possible."""
    if any(fnmatch(name, pattern) for pattern in VERBATIM):
        return path
    if name == TOKENIZER_CONFIG:
        values = json.loads(path.read_text(encoding="utf-8"))
        is_path = {key: key.endswith(("_path", "_file")) for key in values}
        return _json_bytes(
            {key: strip_local_path(value) if is_path[key] else value for key, value in values.items()}
        )
    if name == PREDICTIONS_FILE:
        lines = path.read_text(encoding="utf-8").split("\n")
        return b"".join(_prediction(line) for line in lines if line)
    if name.endswith(".json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        return _json_bytes(strip_local_paths(values, PATH_KEYS_BY_FILE.get(name, ())))
    if name == RECIPE_FILE:
        recipe = strip_recipe_paths(yaml.safe_load(path.read_text(encoding="utf-8")))
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    return path


def _json_bytes(values: Any) -> bytes:
    """Serialize as the package and transformers write their files."""
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _prediction(line: str) -> bytes:
    """Return a line of predictions with bare names of its file and images; questions and answers stay."""
    row = json.loads(line)
    names = {key: _file_names(row[key]) for key in PATH_KEYS_OF_PREDICTIONS if key in row}
    return (json.dumps(row | names, ensure_ascii=False) + "\n").encode()


def _file_names(value: str | Iterable[Any]) -> Any:
    if not isinstance(value, str):
        return [_file_names(entry) if isinstance(entry, str) else entry for entry in value]
    return re.sub(r"^(/|~)[^:\n]*/", "", value)
