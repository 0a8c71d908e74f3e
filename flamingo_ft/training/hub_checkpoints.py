"""Checkpoints on the Hugging Face Hub: uploaded while training, downloaded on resume.

Each checkpoint is one commit, which also deletes the oldest checkpoint, so readers see all of it or nothing.

The client's own `run_as_future` runs in a thread that Python waits for at exit, so Ctrl-C could not abandon
an upload to a Hub that does not answer, and the client retries single requests but not a whole commit: hence
the thread and the retries here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import atomic, processes
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.errors import CLIENT_ERRORS, error_reason, safe_message, with_retries
from flamingo_ft.hub.upload import folder_additions, limit_timeouts, no_progress_bars
from flamingo_ft.publish import files_to_push

from .checkpoint_folders import checkpoint_folder, verify
from .monitoring import ThroughputMeter

FOLDER = "checkpoints"  # in the repository
NOTICE_AFTER = 2.0  # seconds of waiting for uploads before a line is logged
ADAPTER = "the adapter"


def prepare_repository(repository: str, starts_new_run: bool) -> None:
    """Create the repository if needed and check write access, before hours of training.

    Raises UserError if that fails, and if a new run would start beside the checkpoints of another one: they
    would have the higher steps, so the new run's checkpoints would be deleted first.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.auth_check(repository, write=True)
        existing = steps_on_hub(api, repository) if starts_new_run else []
    except CLIENT_ERRORS as error:
        raise UserError(f"train.push_to_hub: {repository}: {error_reason(error, writes=True)}") from None
    if existing:
        raise UserError(
            f"train.push_to_hub: {repository} holds step-{existing[0]} of an earlier run; "
            f"resume that run with --resume, delete its {FOLDER}, or choose another repository"
        )


@contextmanager
def background_uploads(
    repository: str | None, limit: int, log: Callable[[str], None]
) -> Generator[BackgroundUploads | None]:
    """Yield the uploads to ``repository`` and wait for them at the end.

    Yields None without a repository, and in all processes but the main one.
    """
    if repository is None or not processes.is_main():
        yield None
        return
    with limit_timeouts():
        uploads = BackgroundUploads(repository, limit, log)
        try:
            yield uploads
        finally:
            uploads.finish()


class PushCheckpoints(TrainerCallback):
    """Uploads each checkpoint after it is saved. meter: paused while the upload is queued."""

    def __init__(self, uploads: BackgroundUploads, root: Path, meter: ThroughputMeter):
        self.uploads, self.root, self.meter = uploads, root, meter

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        with self.meter.paused():
            self.uploads.push_checkpoint(checkpoint_folder(self.root, state.global_step))


class BackgroundUploads:
    """Uploads one at a time in a background thread; a newer checkpoint replaces one that is still waiting.

    limit: number of checkpoints to keep on the Hub. log: called with a line for each failed upload. missing:
    what is not on the Hub yet (the newest checkpoint, the adapter).
    """

    def __init__(self, repository: str, limit: int, log: Callable[[str], None]):
        self.repository, self.limit, self.log = repository, limit, log
        self.missing: list[str] = []
        self._api = HfApi()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._waiting: tuple[str, Path] | None = None  # name and files of a checkpoint
        self._lock = Lock()
        # A daemon, so that a user can leave with Ctrl-C while the Hub does not answer.
        self._thread = Thread(target=self._work, name="push", daemon=True)
        self._thread.start()

    def push_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint as it is now; the folder may be deleted at any time after this call."""
        with self._lock:
            self.missing = [folder.name]
        try:
            files = _link_for_upload(folder)
        except OSError as error:
            self.log(f"not uploaded to {self.repository}: {folder.name} ({error_message(error)})")
            return
        with self._lock:
            replaced, self._waiting = self._waiting, (folder.name, files)
        if replaced is not None:
            shutil.rmtree(replaced[1], ignore_errors=True)
        self._tasks.put(self._upload_waiting)

    def push_run(self, output_dir: Path) -> None:
        """Upload the adapter of a finished run to the root of the repository."""
        with self._lock:
            self.missing = [*self.missing, ADAPTER]
        self._tasks.put(partial(self._upload, ADAPTER, partial(self._commit_run, output_dir)))

    def finish(self) -> None:
        """Wait for all uploads, and log what is not on the Hub."""
        self._tasks.put(None)
        try:
            self._thread.join(NOTICE_AFTER)
            if self._thread.is_alive():
                self.log(
                    f"waiting for uploads to {self.repository}; Ctrl-C leaves the rest on this machine only"
                )
                self._thread.join()
        finally:
            if self.missing:
                self.log(
                    f"not uploaded to {self.repository}: {' and '.join(self.missing)} (on this machine only)"
                )

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _upload_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting is None:  # an earlier task has already uploaded the checkpoint that replaced it
            return
        name, files = waiting
        self._upload(name, partial(self._commit_checkpoint, name, files))
        shutil.rmtree(files, ignore_errors=True)

    def _upload(self, name: str, commit: Callable[[], None]) -> None:
        """Try several times; log a failure without raising it."""
        try:
            with no_progress_bars():
                with_retries(commit, lambda error: True)
        except CLIENT_ERRORS as error:
            self.log(f"not uploaded to {self.repository}: {name} ({safe_message(error)})")
            return
        with self._lock:
            self.missing = [entry for entry in self.missing if entry != name]

    def _commit_checkpoint(self, name: str, files: Path) -> None:
        others = [step for step in steps_on_hub(self._api, self.repository) if f"step-{step}" != name]
        deletions = [
            CommitOperationDelete(f"{FOLDER}/step-{step}/", is_folder=True)
            for step in others[self.limit - 1 :]
        ]
        operations = [*folder_additions(files, f"{FOLDER}/{name}/"), *deletions]
        message = f"Checkpoint of {name.replace('-', ' ')}"
        self._api.create_commit(self.repository, operations, commit_message=message)

    def _commit_run(self, output_dir: Path) -> None:
        # The client's upload_folder may take several commits, and someone may load the adapter between two of
        # them.
        files = files_to_push(output_dir, self.repository)
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        self._api.create_commit(self.repository, operations, commit_message="The trained adapter")


def _link_for_upload(folder: Path) -> Path:
    """Link (or copy) a checkpoint's files to a folder that pruning does not delete."""
    copy = atomic.partial_path(folder.with_name(f"{folder.name}.pushed"))
    atomic.link_folder(folder, copy)
    return copy


def steps_on_hub(api: HfApi, repository: str) -> list[int]:
    """Return the steps of the checkpoints on the Hub, newest first."""
    matches = (re.match(rf"{FOLDER}/step-(\d+)/", path) for path in api.list_repo_files(repository))
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def fetch_newer_checkpoint(repository: str, root: Path, after_step: int) -> Iterator[str]:
    """Download the newest undamaged checkpoint after ``after_step`` into ``root``; yield lines for the user.

    Raises UserError if the Hub cannot be reached and there is no local checkpoint (``after_step`` is -1).
    """
    api = HfApi()
    try:
        for step in steps_on_hub(api, repository):
            if step <= after_step:
                return
            try:
                yield f"fetched {_fetch(repository, root, step)} from {repository}"
                return
            except UserError as error:
                yield f"damaged on the Hub: {error}"
    except RepositoryNotFoundError:
        return
    except CLIENT_ERRORS as error:
        if after_step < 0:
            raise UserError(f"train.push_to_hub: {repository}: {error_reason(error, writes=True)}") from None
        yield f"could not look for newer checkpoints in {repository} ({safe_message(error)})"


def _fetch(repository: str, root: Path, step: int) -> Path:
    """Download and verify a checkpoint, then move it into place."""
    folder = checkpoint_folder(root, step)
    with _scratch_folder(root) as scratch, no_progress_bars():
        snapshot_download(repository, allow_patterns=[f"{FOLDER}/{folder.name}/*"], local_dir=scratch)
        downloaded = scratch / FOLDER / folder.name
        verify(downloaded)
        partial_folder = atomic.begin_folder(folder)
        partial_folder.rmdir()
        downloaded.rename(partial_folder)
    atomic.finish_folder(folder)
    return folder


@contextmanager
def _scratch_folder(root: Path) -> Generator[Path]:
    """Yield a temporary folder on the same disk as ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    scratch = atomic.begin_folder(root / "download")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
