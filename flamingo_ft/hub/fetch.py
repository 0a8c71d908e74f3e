"""From a name on the Hub to a folder here, with no more in it than a model needs; a path stays a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import CONFIG_FILE, TORCH_SUFFIXES, WEIGHT_PATTERNS

from .errors import CLIENT_ERRORS, hub_error, is_transient, is_unreachable, with_retries
from .names import HubName, commit_of, existing_path, hub_name

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.yaml")
# Checkpoints, figures and logs of a run lie in folders; what trainers of others leave beside the weights.
NOT_NEEDED = ("*/*", "training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")


def fetch_model(place: str | Path, **options: Any) -> Path:
    """Where the files of an adapter, a model, a composition or a checkpoint lie on this machine.

    place: a path, or ``org/name[@revision]`` on the Hub: then the folder of its snapshot in the cache, or the one file of
    a repository that holds a checkpoint and no configuration. What is in the cache is not fetched again. options: the
    client's ``token``, ``cache_dir``, ``local_files_only``, ... Raises UserError for a path that does not exist, and for
    what is not on the Hub, not to be had, or holds no model.
    """
    name = hub_name(place)
    if name is None:
        return existing_path(place)
    folder = _fetch(name, options)
    found = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if (folder / CONFIG_FILE) in found:
        return folder
    checkpoints = [path for path in found if path.suffix in TORCH_SUFFIXES]
    if len(checkpoints) != 1:
        held = ", ".join(sorted(path.name for path in found)[:3]) or "no files of one"
        raise UserError(
            f"{name}: holds no model (found {held}); name a repository with config.json or one checkpoint"
        )
    return checkpoints[0]


def pinned_name(place: str | Path, found: Path) -> str:
    """What to write down of ``place``, which `fetch_model` found: it leads to the same content later, or on a copy."""
    name = hub_name(place)
    return str(Path(place).resolve()) if name is None else str(HubName(name.repository, commit_of(found)))


def _fetch(name: HubName, options: Mapping[str, Any]) -> Path:
    """Download the small files and the weights in one format; all of one commit."""
    revision = name.revision
    for patterns in WEIGHT_PATTERNS:
        folder = download(
            str(name), name.repository, revision, [*SMALL_FILES, *patterns], NOT_NEEDED, **options
        )
        if any(path for pattern in patterns for path in folder.glob(pattern)):
            break
        revision = commit_of(folder)
    return folder


def download(
    asked: str,
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    skipped: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Fetch the files of a repository that match ``patterns`` into the cache, unless they are there; their folder, which
    does not exist where nothing matches. UserError, about ``asked``, where the Hub has or gives none."""
    take = partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=[*patterns],
        ignore_patterns=[*skipped],
        **options,
    )
    try:
        return Path(with_retries(take, lambda error: is_transient(error) and not is_unreachable(error)))
    except CLIENT_ERRORS as error:
        raise hub_error(asked, error) from None
