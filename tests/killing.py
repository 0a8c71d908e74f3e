"""Start and kill runs of the real command line.

Each runs in its own process, forked from one that has already imported everything, so that a kill hits the
run and not its imports.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
PRELOADED = ["flamingo_ft.training.train", "flamingo_ft.config.library", "tests.killing"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)
gc.collect()
gc.freeze()  # runs that are forked from here do not search what is imported for garbage


@dataclass(frozen=True)
class Around:
    """The surroundings of a run.

    environment: additional environment variables. file_limit: maximum size of a file in bytes.
    hub: values of `huggingface_hub.constants`.
    spoil: called in the run's process before the run; a function of a module, so that it can be pickled.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    file_limit: int | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    spoil: Callable[[], None] | None = None


def start(arguments: Sequence[str], folder: Path, log: Path, around: Around = Around()) -> BaseProcess:
    """Run ``flamingo-ft ARGUMENTS`` in ``folder``, with its output appended to ``log``."""
    process = FORKS.Process(target=_run, args=(list(arguments), str(folder), str(log), around))
    process.start()
    return process


def _run(arguments: list[str], folder: str, log: str, around: Around) -> None:
    import huggingface_hub
    import torch

    from flamingo_ft.cli import main

    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ |= around.environment
        torch.set_num_threads(1)
        for name, value in around.hub.items():
            setattr(huggingface_hub.constants, name, value)
        if around.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (around.file_limit, around.file_limit))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        if around.spoil is not None:
            around.spoil()
        code = main(arguments)
    finally:
        if sys.exc_info()[1] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without multiprocessing's clean-up, which may wait for workers


def wait(process: BaseProcess) -> int:
    """Wait for a process. Return its exit code, or minus the number of the signal that ended it."""
    process.join()
    return process.exitcode


def kill_when(
    process: BaseProcess,
    moment: Callable[[], bool],
    number: int = signal.SIGKILL,
    poll: float = 0.0005,
    send: Callable[[int, int], None] = os.kill,
) -> int:
    """Send a signal as soon as ``moment`` returns True, and return the exit code of the process.

    A process that ends before is not signalled. send: os.killpg signals its workers too.
    """
    while not moment():
        if process.exitcode is not None:
            return process.exitcode
        time.sleep(poll)
    if process.exitcode is None:
        send(process.pid, number)
    return wait(process)


def after(seconds: float) -> Callable[[], bool]:
    """Return a moment that comes in so many seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def file_there(folder: Path, pattern: str) -> Callable[[], bool]:
    """Return a moment that comes when a file in the folder matches the pattern."""
    return lambda: any(folder.glob(pattern))
