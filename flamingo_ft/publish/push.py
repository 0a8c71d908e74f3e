"""``flamingo-ft push``: an adapter with its base, or a merged model, to repositories on the Hub."""

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
from flamingo_ft.adapters.card import CARD, card_text
from flamingo_ft.adapters.files import read_config, read_flamingo_config
from flamingo_ft.adapters.multi_adapter import check_same_base
from flamingo_ft.adapters.remote_code import WITHOUT_THE_PACKAGE
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.merging import MERGE_FILE, merge_adapter
from flamingo_ft.evaluation.results import PREDICTIONS_FILE
from flamingo_ft.hub import existing_path, fetch_model
from flamingo_ft.hub.local_paths import strip_local_path, strip_local_paths
from flamingo_ft.hub.names import NAME, looks_like_path
from flamingo_ft.hub.upload import create_repository, upload
from flamingo_ft.hub.weight_files import (
    ADAPTER_CONFIG,
    ANY_INDEX,
    ANY_SAFETENSORS,
    is_adapter,
    is_whole_model,
)
from flamingo_ft.model import FlamingoConfig

BASE_ENDING = "-base"


@dataclass(frozen=True)
class PushResult:
    """repository: name on the Hub; base: that of an adapter's composition, None for a model; url: of the commit."""

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
    say: Callable[[str], None] = lambda line: None,
) -> PushResult:
    """Push the adapter or the model in ``folder``, each repository in one commit.

    folder: of a run, an adapter or a merged model; merged: merge an adapter first. private, revision: of repositories
    that are not there yet, and the branch to commit to. base: a composition on the Hub to share, which is not written
    to; by default the adapter's own goes to ``repository`` with "-base" behind it. license: for the card. start: where the
    bridge that the adapter builds on lies now. say: hears what is done.

    Raises UserError for a folder that holds neither, a name that is none, a base that is another, and what the Hub refuses.
    """
    _check_names(repository, base)
    folder = existing_path(folder)
    is_adapter = _check_folder(folder, merged, base)
    if not is_adapter:
        create_repository(repository, private, revision)
        return _push_model(folder, repository, revision, license, say)
    if merged:
        create_repository(repository, private, revision)
        with tempfile.TemporaryDirectory() as scratch:
            say(f"merging {folder}")
            merge_adapter(folder, Path(scratch) / "merged", start=start)
            return _push_model(Path(scratch) / "merged", repository, revision, license, say)
    return _push_adapter(folder, repository, base, private, revision, license, start, say)


def _check_names(repository: str, base: str | None) -> None:
    for name in filter(None, (repository, base)):
        found = NAME.fullmatch(name)
        if found is None or found["revision"]:
            raise UserError(f"{name}: no name of a repository; give org/name")


def _check_folder(folder: Path, merged: bool, base: str | None) -> bool:
    """Whether it holds an adapter; UserError where it holds no merged model either."""
    if is_adapter(folder):
        read_config(folder)
        if merged and base:
            raise UserError(
                f"found --merged and --base {base}; a merged model builds on nothing: give one of them"
            )
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
    folder: Path, repository: str, branch: str | None, license: str | None, say: Callable[[str], None]
) -> PushResult:
    return PushResult(
        repository, None, _commit(repository, files_to_push(folder, repository, license), branch, say)
    )


def _push_adapter(
    folder: Path,
    repository: str,
    shared: str | None,
    private: bool,
    branch: str | None,
    license: str | None,
    start: str | Path | None,
    say: Callable[[str], None],
) -> PushResult:
    """The base first: an adapter that is there can be loaded."""
    base = shared or repository + BASE_ENDING
    config = read_config(folder)
    _tell_local_parts(folder, config, say)
    if shared:
        check_same_base(folder, read_flamingo_config(fetch_model(shared)), config)
        create_repository(repository, private, branch)
    else:
        _push_base(folder, base, repository, private, branch, start, say)
    files = files_to_push(folder, repository, license)
    named = {"base_model_name_or_path": base, "revision": None if shared else branch}  # as PEFT keeps them
    files[ADAPTER_CONFIG] = json_bytes(json.loads(files[ADAPTER_CONFIG]) | named)
    return PushResult(repository, base, _commit(repository, files, branch, say))


def _push_base(
    folder: Path,
    base: str,
    repository: str,
    private: bool,
    branch: str | None,
    start: str | Path | None,
    say: Callable[[str], None],
) -> None:
    """Write the adapter's composition and push it, where the adapter may be pushed too."""
    with tempfile.TemporaryDirectory() as scratch:
        composition = Path(scratch) / "base"
        write_composition(folder, composition, start=start)
        for name in (base, repository):
            create_repository(name, private, branch)
        _commit(base, publishable_files(composition), branch, say)


def _commit(
    repository: str, files: dict[str, bytes | Path], branch: str | None, say: Callable[[str], None]
) -> str:
    size = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in files.values())
    say(f"{repository}: {len(files)} files, {size / 1e6:,.1f} MB")
    return upload(repository, files, "Pushed with flamingo_ft", branch=branch, replaced=is_weights, say=say)


def _tell_local_parts(folder: Path, config: FlamingoConfig, say: Callable[[str], None]) -> None:
    """What nobody else can load: an adapter of backbones that are folders here."""
    for part, source in config.backbones.items():
        if looks_like_path(source["name"]):
            say(
                f"{folder}: its {part} backbone is a folder of this machine, which nobody else has; "
                "push that too and train with its name, or push with --merged"
            )


PUBLISHED_PATTERNS = (
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


def is_published(path: str) -> bool:
    """Whether a file, by its path in a folder, is of the adapter or the model there, and not of what else a run leaves."""
    if "/" in path:
        return bool(FIGURES.fullmatch(path)) and path != OF_SAMPLES
    return any(fnmatch(path, one) for one in PUBLISHED_PATTERNS) and not path.startswith(".")


def is_weights(path: str) -> bool:
    """Whether a loader would take the file for weights, beside others or in their place."""
    return "/" not in path and any(fnmatch(path, one) for one in ANY_SAFETENSORS)


def publishable_files(folder: Path) -> dict[str, bytes | Path]:
    """Path -> content, or the file itself where nothing in it is to be left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: _shown(name, path) for name, path in named.items() if is_published(name)}


def files_to_push(folder: Path, repository: str, license: str | None = None) -> dict[str, bytes | Path]:
    """The same with a card of what lies there, under its name on the Hub."""
    files = publishable_files(folder)
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
