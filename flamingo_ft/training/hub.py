"""Checkpoints on the Hugging Face Hub, for machines that are gone tomorrow: pushed as they come, and gone on from.

A checkpoint becomes one commit, so that whoever looks sees all of it or nothing; the same commit removes the oldest.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from flamingo_ft import atomic, processes
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.errors import CLIENT_ERRORS, error_reason, safe_message, with_retries
from flamingo_ft.hub.upload import additions, limit_timeouts, no_progress_bars
from flamingo_ft.publish import files_to_push

from .checkpoints import checkpoint_folder, verify

FOLDER = "checkpoints"
PATIENCE = 2.0  # seconds until it is said that uploads are waited for
ADAPTER = "the adapter"


def prepare_repository(repository: str, begins: bool) -> None:
    """Make sure, before hours of training, that it is there and may be written to. UserError where not, and where a run
    begins beside the checkpoints of another: its own would be the oldest of all."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.auth_check(repository, write=True)
        earlier = checkpoints_of(api, repository) if begins else []
    except CLIENT_ERRORS as error:
        raise UserError(f"train.push_to_hub: {repository}: {error_reason(error, writes=True)}") from None
    if earlier:
        raise UserError(
            f"train.push_to_hub: {repository} holds step-{earlier[0]} of an earlier run; go on with that run with --resume, "
            f"remove its {FOLDER}, or name another repository"
        )


@contextmanager
def pushing(repository: str | None, limit: int, say: Callable[[str], None]) -> Iterator[Pushing | None]:
    """What pushes to ``repository``, None for none; however the block ends, uploads are waited for."""
    if repository is None or not processes.is_main():
        yield None
        return
    with limit_timeouts():
        uploads = Pushing(repository, limit, say)
        try:
            yield uploads
        finally:
            uploads.finish()


class Pushing:
    """Uploads in the background, one at a time; a checkpoint that waits gives way to a newer one.

    limit: how many checkpoints stay on the Hub. say: hears in a line of what could not be uploaded. missing: what is
    to be on the Hub and is not yet: the newest checkpoint, the adapter.
    """

    def __init__(self, repository: str, limit: int, say: Callable[[str], None]):
        self.repository, self.limit, self.say = repository, limit, say
        self.missing: list[str] = []
        self._api = HfApi()
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._waiting: list[tuple[str, Path]] = []  # at most one checkpoint, and its files
        self._lock = Lock()
        # A daemon, so that who is tired of waiting for a Hub that does not answer can leave.
        self._thread = Thread(target=self._work, name="push", daemon=True)
        self._thread.start()

    def push_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint as it is now; it may be removed at any time after this."""
        with self._lock:
            self.missing = [folder.name]
        try:
            held = _hold(folder)
        except OSError as error:
            self.say(f"not pushed to {self.repository}: {folder.name} ({error_message(error)})")
            return
        with self._lock:
            replaced, self._waiting = self._waiting, [(folder.name, held)]
        for _, files in replaced:
            shutil.rmtree(files, ignore_errors=True)
        self._todo.put(self._upload_waiting)

    def push_run(self, output_dir: Path) -> None:
        """Upload a finished run's own files, so that people find the adapter under the repository's name."""
        with self._lock:
            self.missing = [*self.missing, ADAPTER]
        self._todo.put(partial(self._upload, ADAPTER, partial(self._commit_run, output_dir)))

    def finish(self) -> None:
        """Wait for all uploads, and say what is not on the Hub."""
        self._todo.put(None)
        try:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self.say(
                    f"waiting for uploads to {self.repository}; Ctrl-C leaves them on this machine alone"
                )
                self._thread.join()
        finally:
            if self.missing:
                self.say(f"{self.repository} lacks {' and '.join(self.missing)}, on this machine alone")

    def _work(self) -> None:
        while (upload := self._todo.get()) is not None:
            upload()

    def _upload_waiting(self) -> None:
        with self._lock:
            taken, self._waiting = self._waiting, []
        for name, held in taken:  # none, where it gave way to a newer one that is uploaded by now
            self._upload(name, partial(self._commit_checkpoint, name, held))
            shutil.rmtree(held, ignore_errors=True)

    def _upload(self, name: str, commit: Callable[[], None]) -> None:
        """Try several times; a failure is reported, and ends nothing."""
        try:
            with no_progress_bars():
                with_retries(commit, lambda error: True)
        except CLIENT_ERRORS as error:
            self.say(f"not pushed to {self.repository}: {name} ({safe_message(error)})")
            return
        with self._lock:
            self.missing = [one for one in self.missing if one != name]

    def _commit_checkpoint(self, name: str, held: Path) -> None:
        others = [step for step in checkpoints_of(self._api, self.repository) if f"step-{step}" != name]
        gone = [
            CommitOperationDelete(f"{FOLDER}/step-{step}/", is_folder=True)
            for step in others[self.limit - 1 :]
        ]
        message = f"Checkpoint of {name.replace('-', ' ')}"
        self._api.create_commit(
            self.repository, [*additions(held, f"{FOLDER}/{name}/"), *gone], commit_message=message
        )

    def _commit_run(self, output_dir: Path) -> None:
        # The client's own upload of a folder may take several commits, and people load an adapter between them.
        own = [
            CommitOperationAdd(path, content)
            for path, content in files_to_push(output_dir, self.repository).items()
        ]
        self._api.create_commit(self.repository, own, commit_message="The trained adapter")


def _hold(folder: Path) -> Path:
    """The same files under a name that nobody removes."""
    held = atomic.partial_path(folder.with_name(f"{folder.name}.pushed"))
    atomic.link_folder(folder, held)
    return held


def checkpoints_of(api: HfApi, repository: str) -> list[int]:
    """Steps of the checkpoints on the Hub, newest first."""
    paths = api.list_repo_files(repository)
    found = {int(match[1]) for path in paths if (match := re.match(rf"{FOLDER}/step-(\d+)/", path))}
    return sorted(found, reverse=True)


def fetch_newer(repository: str, root: Path, than: int) -> Iterator[str]:
    """Bring the newest whole checkpoint after step ``than`` from the Hub into ``root``; says what it did.

    Raises UserError where the Hub does not answer and there is nothing to go on from here.
    """
    api = HfApi()
    try:
        steps = [step for step in checkpoints_of(api, repository) if step > than]
        for step in steps:
            try:
                yield f"fetched {_fetch(repository, root, step)} from {repository}"
                return
            except UserError as error:
                yield f"damaged on the Hub: {error}"
    except RepositoryNotFoundError:
        return
    except CLIENT_ERRORS as error:
        if than < 0:
            raise UserError(f"train.push_to_hub: {repository}: {error_reason(error, writes=True)}") from None
        yield f"{repository} was not looked at ({safe_message(error)})"


def _fetch(repository: str, root: Path, step: int) -> Path:
    """Download, verify, and put in place."""
    folder = checkpoint_folder(root, step)
    with _scratch(root) as scratch, no_progress_bars():
        snapshot_download(repository, allow_patterns=[f"{FOLDER}/{folder.name}/*"], local_dir=scratch)
        downloaded = scratch / FOLDER / folder.name
        verify(downloaded)
        hidden = atomic.begin_folder(folder)
        hidden.rmdir()
        downloaded.rename(hidden)
    atomic.finish_folder(folder)
    return folder


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder on the same disk that is gone afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    scratch = atomic.begin_folder(root / "download")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
