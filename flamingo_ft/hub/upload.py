"""Upload of files to a repository on the Hub in one commit, so that nobody sees half of them.

Large files are uploaded before the commit by their SHA-256; files already on the Hub, including
from an interrupted upload, are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    close_session,
    get_session,
    get_token,
)
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .compat import client_factory, replace_client_factory
from .errors import CLIENT_ERRORS, error_reason, hub_error, with_retries

TIMEOUT_S = 120.0  # seconds without a byte after which a connection counts as lost

Files = Mapping[str, "bytes | Path"]  # path in the repository -> content, or the local file


def require_token(repository: str) -> None:
    """Raise UserError if there is no token on this machine: nobody may write to a repository without one."""
    if get_token() is None:
        raise hub_error(repository, LocalTokenNotFoundError(), writes=True)


def create_repository(repository: str, private: bool = False, branch: str | None = None) -> None:
    """Create a repository and its branch unless they exist. Raises UserError if it may not be written to."""
    api = HfApi()
    try:
        with_retries(partial(_create, api, repository, private, branch))
    except CLIENT_ERRORS as error:
        raise hub_error(repository, error, writes=True) from None


def _create(api: HfApi, repository: str, private: bool, branch: str | None) -> None:
    api.create_repo(repository, private=private, exist_ok=True)
    api.auth_check(repository, write=True)
    if branch is not None:
        api.create_branch(repository, branch=branch, exist_ok=True)


def upload(
    repository: str,
    files: Files,
    title: str,
    *,
    branch: str | None = None,
    replaced: Callable[[str], bool] = lambda path: False,
    log: Callable[[str], None] = lambda line: None,
) -> str:
    """Commit ``files`` and return the URL of the commit. Raises UserError if that fails after all retries.

    Args:
        replaced: which of the repository's other files, by path, the commit deletes.
        log: called with a line for each retry.
    """
    api = HfApi()
    additions = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]

    def commit() -> str:
        existing = api.list_repo_files(repository, revision=branch)
        deletions = [CommitOperationDelete(path) for path in existing if path not in files and replaced(path)]
        info = api.create_commit(repository, [*additions, *deletions], commit_message=title, revision=branch)
        return info.commit_url

    def log_retry(error: Exception, seconds: float) -> None:
        log(f"{repository}: {error_reason(error, writes=True)}; trying again in {seconds:.0f} s")

    try:
        with limit_timeouts():
            return with_retries(commit, on_retry=log_retry)
    except CLIENT_ERRORS as error:
        raise hub_error(repository, error, writes=True) from None


def folder_additions(folder: Path, prefix: str = "") -> Sequence[CommitOperationAdd]:
    """Return the additions of all files in ``folder``; each is read from disk as it is uploaded."""
    return [
        CommitOperationAdd(f"{prefix}{path.relative_to(folder).as_posix()}", path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


@contextmanager
def limit_timeouts() -> Generator[None]:
    """Set timeouts inside the block for requests that have none: by default they wait for the Hub forever.

    The client has settings for the timeouts of downloads, but none for those of uploads and commits. All else
    that a user set stays: the session itself (proxy, certificates, headers), and the factory that creates the
    next one after a connection failed.
    """
    factory, session = client_factory(), get_session()
    timeout = session.timeout

    def limited_factory() -> Any:
        client = factory()
        client.timeout = _with_limits(client.timeout)
        return client

    session.timeout = _with_limits(timeout)
    replace_client_factory(limited_factory)
    try:
        yield
    finally:
        session.timeout = timeout
        if client_factory() is limited_factory:  # unless the block set another
            replace_client_factory(factory)
            if get_session() is not session:  # a limited one; the next is the user's own again
                close_session()


def _with_limits(timeout: Any) -> Any:
    """Return a client's timeouts with `TIMEOUT_S` in place of each that is None."""
    seconds = {kind: TIMEOUT_S if value is None else value for kind, value in timeout.as_dict().items()}
    return type(timeout)(**seconds)


@contextmanager
def no_progress_bars() -> Generator[None]:
    """Hide the client's progress bars inside the block; they would interfere with the trainer's."""
    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            enable_progress_bars()
