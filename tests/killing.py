"""Runs of the real command line that are killed: each in a process of its own, forked from one that has imported
everything, so that a kill falls into the run and not into its imports."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate.state import AcceleratorState

from flamingo_ft.cli import main

KILLED = -signal.SIGKILL


def start(arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run ``flamingo-ft ARGUMENTS`` in ``folder``, what it prints appended to ``log``; gives its process number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ |= environment or {}
        AcceleratorState._reset_state(reset_partial_state=True)  # how many processes there are is asked anew
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def kill_when(
    process: int,
    moment: Callable[[], bool],
    number: int = signal.SIGKILL,
    poll: float = 0.0005,
    send: Callable[[int, int], None] = os.kill,
) -> int:
    """Send a signal as soon as ``moment`` has come; its exit code, which is its own if it ended before. send: os.killpg
    for one to its workers too."""
    while not moment():
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(poll)
    send(process, number)
    return wait(process)


def after(seconds: float) -> Callable[[], bool]:
    """The moment so many seconds from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def file_there(folder: Path, pattern: str) -> Callable[[], bool]:
    """The moment when something of that name is in the folder."""
    return lambda: any(folder.glob(pattern))
