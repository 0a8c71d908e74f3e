"""Kill runs of the real command line: each in a process of its own, forked from one that has
imported everything and done nothing, so that a kill falls into the run and not into its imports."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Around:
    """What a run finds. environment: variables beside the usual ones; file_limit: bytes that no file may
    exceed; hub: what `huggingface_hub.constants` are; spoil: called in the run's process before it begins, a
    function of a module."""

    environment: Mapping[str, str] = field(default_factory=dict)
    file_limit: int | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    spoil: Callable[[], None] | None = None


def start(arguments: Sequence[str], folder: Path, log: Path, around: Around = Around()) -> BaseProcess:
    """Run ``flamingo-ft ARGUMENTS`` in ``folder``, what it prints appended to ``log``."""
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
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: BaseProcess) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    process.join()
    return process.exitcode


def kill_when(
    process: BaseProcess,
    moment: Callable[[], bool],
    number: int = signal.SIGKILL,
    poll: float = 0.0005,
    send: Callable[[int, int], None] = os.kill,
) -> int:
    """Send a signal as soon as ``moment`` has come; its exit code, which is its own if it ended before. send:
    os.killpg for one to its workers too."""
    while not moment():
        if process.exitcode is not None:
            return process.exitcode
        time.sleep(poll)
    if process.exitcode is None:
        send(process.pid, number)
    return wait(process)


def after(seconds: float) -> Callable[[], bool]:
    """The moment so many seconds from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def file_there(folder: Path, pattern: str) -> Callable[[], bool]:
    """The moment when something of that name is in the folder."""
    return lambda: any(folder.glob(pattern))
