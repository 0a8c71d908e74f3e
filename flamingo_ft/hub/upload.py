"""Files to a repository on the Hub as one commit, so that nobody sees half of them.

Large files go up before the commit, by their SHA-256: what is there already, from an upload that broke off too, is not
sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .connection import silence_ends
from .errors import FAILURES, reason, told
from .retry import patiently

Files = Mapping[str, "bytes | Path"]  # path in the repository -> content, or the file that has it


def make_repository(repository: str, private: bool = False, branch: str | None = None) -> None:
    """Make sure that it is there, and the branch of it, and may be written to. UserError where not."""
    api = HfApi()
    try:
        patiently(partial(_make, api, repository, private, branch))
    except FAILURES as error:
        raise told(repository, error, writes=True) from None


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
        say(f"{repository}: {reason(error, writes=True)}; trying again in {seconds:.0f} s")

    try:
        with silence_ends():
            return patiently(commit, say=again)
    except FAILURES as error:
        raise told(repository, error, writes=True) from None


def additions(folder: Path, below: str = "") -> Sequence[CommitOperationAdd]:
    """All files of ``folder``, each read from the disk as it goes up."""
    return [
        CommitOperationAdd(f"{below}{path.relative_to(folder).as_posix()}", path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
