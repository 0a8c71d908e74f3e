"""Files to a repository on the Hub as one commit, so that nobody sees half of them.

Large files go up before the commit, by their SHA-256: what is there already, from an upload that broke off too, is not
sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, close_session, get_session
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .compat import client_factory, replace_client_factory
from .errors import CLIENT_ERRORS, error_reason, hub_error, with_retries

Files = Mapping[str, "bytes | Path"]  # path in the repository -> content, or the file that has it


def create_repository(repository: str, private: bool = False, branch: str | None = None) -> None:
    """Make sure that it is there, and the branch of it, and may be written to. UserError where not."""
    api = HfApi()
    try:
        with_retries(partial(_make, api, repository, private, branch))
    except CLIENT_ERRORS as error:
        raise hub_error(repository, error, writes=True) from None


def _make(api: HfApi, repository: str, private: bool, branch: str | None) -> None:
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
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Commit ``files``, in place of what is ``replaced`` of the repository's others; the address of the commit.

    What fails for a while is tried again, which ``say`` hears of. UserError where it stays so.
    """
    api = HfApi()
    additions = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]

    def commit() -> str:
        there = api.list_repo_files(repository, revision=branch)
        gone = [CommitOperationDelete(path) for path in there if path not in files and replaced(path)]
        made = api.create_commit(repository, [*additions, *gone], commit_message=title, revision=branch)
        return str(made.commit_url)

    def again(error: Exception, seconds: float) -> None:
        say(f"{repository}: {error_reason(error, writes=True)}; trying again in {seconds:.0f} s")

    try:
        with limit_timeouts():
            return with_retries(commit, say=again)
    except CLIENT_ERRORS as error:
        raise hub_error(repository, error, writes=True) from None


def additions(folder: Path, below: str = "") -> Sequence[CommitOperationAdd]:
    """All files of ``folder``, each read from the disk as it goes up."""
    return [
        CommitOperationAdd(f"{below}{path.relative_to(folder).as_posix()}", path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


TIMEOUT_S = 120.0  # seconds without a byte, after which a connection counts as lost


@contextmanager
def limit_timeouts() -> Iterator[None]:
    """Limit the client's waiting for a Hub that falls silent, as one does behind a network that is gone.

    Only limits that are not set are changed, and they are put back afterwards. All else that a user set stays: the
    session itself (proxy, certificates, headers), and the factory that makes the next one after a connection failed.
    """
    usual, session = client_factory(), get_session()
    timeout = session.timeout

    def limited_client() -> Any:
        client = usual()
        client.timeout = _limited(client.timeout)
        return client

    session.timeout = _limited(timeout)
    replace_client_factory(limited_client)
    try:
        yield
    finally:
        session.timeout = timeout
        if client_factory() is limited_client:  # not where the block set another
            replace_client_factory(usual)
            if get_session() is not session:  # a limited one: the next is the user's own again
                close_session()


def _limited(timeout: Any) -> Any:
    """A client's timeouts with `TIMEOUT_S` for each that it does not have."""
    seconds = {kind: TIMEOUT_S if value is None else value for kind, value in timeout.as_dict().items()}
    return type(timeout)(**seconds)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """The client's own progress bars would run through others."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
