"""Download from the Hub what a model needs and no more; a path on this machine is returned as it is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm

from flamingo_ft.errors import UserError

from .compat import no_warning_of_unmatched_patterns
from .errors import CLIENT_ERRORS, hub_error, is_transient, is_unreachable, with_retries
from .names import HubName, commit_of, existing_path, hub_name
from .weight_files import CONFIG_FILE, TORCH_SUFFIXES, WEIGHT_PATTERNS

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.yaml")
# Folders (checkpoints, figures and logs of a run), and what other trainers leave beside the weights.
NOT_NEEDED = ("*/*", "training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")
BAR_DELAY_S = 1.0


class LateBar(tqdm):
    """A progress bar that appears after a second: never for files that are in the cache."""

    def __init__(self, *args: Any, **options: Any):
        self.shown_from = time.time() + BAR_DELAY_S
        super().__init__(*args, **{"delay": BAR_DELAY_S, **options})

    def refresh(self, *args: Any, **options: Any) -> Any:
        return super().refresh(*args, **options) if time.time() >= self.shown_from else None


def fetch_model(place: str | Path, **options: Any) -> Path:
    """Return the local path of an adapter, model, composition or checkpoint, downloaded if necessary.

    Args:
        place: a path, or ``org/name[@revision]`` on the Hub.
        options: the client's ``token``, ``cache_dir``, ``local_files_only``, ...

    Returns:
        The path itself; for a repository its snapshot in the cache, or its one checkpoint file if it has no
        config.json.

    Raises:
        UserError: the path does not exist, or the repository does not exist, is closed, or holds no model.
    """
    name = hub_name(place)
    if name is None:
        return existing_path(place)
    folder = _download_model(name, options)
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if (folder / CONFIG_FILE) in files:
        return folder
    checkpoints = [path for path in files if path.suffix in TORCH_SUFFIXES]
    if len(checkpoints) != 1:
        names = ", ".join(sorted(path.name for path in files)[:3]) or "no files of one"
        raise UserError(
            f"{name}: holds no model (got {names}); name a repository with config.json or one checkpoint"
        )
    return checkpoints[0]


def pinned_name(place: str | Path, fetched: Path) -> str:
    """Return what to record of ``place``: an absolute path, or the name with the commit of ``fetched``."""
    name = hub_name(place)
    if name is None:
        return str(Path(place).resolve())
    return str(HubName(name.repository, commit_of(fetched)))


def _download_model(name: HubName, options: Mapping[str, Any]) -> Path:
    """Download the small files and the weights in the preferred format that exists; all of one commit."""
    revision, folder = name.revision, Path()
    for patterns in WEIGHT_PATTERNS:
        folder = download(
            str(name), name.repository, revision, [*SMALL_FILES, *patterns], NOT_NEEDED, **options
        )
        if any(path for pattern in patterns for path in folder.glob(pattern)):
            break
        revision = commit_of(folder)
    return folder


def download(
    name: str,
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    ignored: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Download the files of a repository that match ``patterns``, unless they are in the cache.

    Args:
        name: name of the download in error messages.

    Returns:
        The folder of the snapshot, which does not exist if no file matches.

    Raises:
        UserError: the Hub does not have the repository, or does not give it.
    """
    fetch = partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=[*patterns],
        ignore_patterns=[*ignored],
        tqdm_class=LateBar,
        **options,
    )
    try:
        with no_warning_of_unmatched_patterns():
            return Path(with_retries(fetch, lambda error: is_transient(error) and not is_unreachable(error)))
    except CLIENT_ERRORS as error:
        raise hub_error(name, error) from None
