"""``flamingo-ft push``: an adapter with its base, or a merged model, to repositories on the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flamingo_ft.adapters import write_composition
from flamingo_ft.adapters.files import read_config, read_flamingo_config
from flamingo_ft.adapters.several import check_same_base
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.hub import existing, fetch_model
from flamingo_ft.hub.names import NAME, looks_like_path
from flamingo_ft.hub.upload import make_repository, upload
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG, is_adapter, is_whole_model
from flamingo_ft.model import FlamingoConfig

from .files import files_of, is_weights, json_bytes, with_card

BASE_ENDING = "-base"


@dataclass(frozen=True)
class Pushed:
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
) -> Pushed:
    """Push the adapter or the model in ``folder``, each repository in one commit.

    folder: of a run, an adapter or a merged model; merged: merge an adapter first. private, revision: of repositories
    that are not there yet, and the branch to commit to. base: a composition on the Hub to share, which is not written
    to; by default the adapter's own goes to ``repository`` with "-base" behind it. license: for the card. start: where the
    bridge that the adapter builds on lies now. say: hears what is done.

    Raises UserError for a folder that holds neither, a name that is none, a base that is another, and what the Hub refuses.
    """
    _check_names(repository, base)
    folder = existing(folder)
    is_adapter = _check_folder(folder, merged, base)
    if not is_adapter:
        make_repository(repository, private, revision)
        return _push_model(folder, repository, revision, license, say)
    if merged:
        make_repository(repository, private, revision)
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
) -> Pushed:
    return Pushed(repository, None, _commit(repository, with_card(folder, repository, license), branch, say))


def _push_adapter(
    folder: Path,
    repository: str,
    shared: str | None,
    private: bool,
    branch: str | None,
    license: str | None,
    start: str | Path | None,
    say: Callable[[str], None],
) -> Pushed:
    """The base first: an adapter that is there can be loaded."""
    base = shared or repository + BASE_ENDING
    config = read_config(folder)
    _tell_local_parts(folder, config, say)
    if shared:
        check_same_base(folder, read_flamingo_config(fetch_model(shared)), config)
        make_repository(repository, private, branch)
    else:
        _push_base(folder, base, repository, private, branch, start, say)
    files = with_card(folder, repository, license)
    named = {"base_model_name_or_path": base, "revision": None if shared else branch}  # as PEFT keeps them
    files[ADAPTER_CONFIG] = json_bytes(json.loads(files[ADAPTER_CONFIG]) | named)
    return Pushed(repository, base, _commit(repository, files, branch, say))


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
            make_repository(name, private, branch)
        _commit(base, files_of(composition), branch, say)


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
