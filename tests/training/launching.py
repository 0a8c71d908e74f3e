"""Run the command line in several processes on CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from tests import killing
from tests.regimes import RECIPE

ROOT = Path(__file__).parents[2]
LIMIT = 180  # seconds until a run is killed
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(output: str, *overrides: str) -> list[str]:
    """Return the arguments of ``flamingo-ft train`` for the folder's recipe."""
    return ["train", "./recipe.yaml", f"train.output_dir={output}", *overrides]


def torchrun(folder: Path, output: str, *overrides: str) -> subprocess.CompletedProcess:
    """Start two processes as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [sys.executable, *LAUNCHER, "-m", "flamingo_ft", *command(output, *overrides)]
    return subprocess.run(started, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)


def train(
    folder: Path, output: str, *overrides: str, processes: int = 2, spoil: Callable[[], None] | None = None
) -> tuple[list[int], str]:
    """Run ``train`` in several processes with torchrun's environment; return their exit codes and output.

    The processes are forked from one that has imported everything, which is quicker than torchrun.
    spoil: called first in each process.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    log = folder / f"{output}.txt"
    ranks = [
        world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        for rank in range(processes)
    ]
    arounds = [killing.Around(environment=rank, spoil=spoil) for rank in ranks]
    started = [killing.start(command(output, *overrides), folder, log, around) for around in arounds]
    # A process may wait for another one forever.
    ended = [killing.kill_when(process, killing.after(LIMIT)) for process in started]
    return ended, log.read_text()


def losses(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def write_data(folder: Path, media: Sequence[Sequence[int]]) -> list[dict]:
    """Write a recipe and a row for each entry of ``media``: frames of each medium, 0 for an image.

    Images differ in shade and in size, so that with tiles they differ in views.
    """
    for shade, size in enumerate([(32, 32), (64, 32), (32, 64), (64, 64)]):
        Image.new("RGB", size, (30 + 60 * shade,) * 3).save(folder / f"{shade}.png")
    rows = [_row(number, frames) for number, frames in enumerate(media)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(RECIPE)
    return rows


def _row(number: int, frames: Sequence[int]) -> dict:
    blocks = [*({"type": "video" if count else "image"} for count in frames)]
    blocks.append({"type": "text", "text": f"Which shade, number {number}?"})
    answer = ("Dark.", "Light, and a longer answer.")[number % 2]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]
    images = [f"{(number + place) % 4}.png" for place, count in enumerate(frames) if not count]
    videos = [[f"{frame % 4}.png" for frame in range(count)] for count in frames if count]
    return {"messages": messages} | ({"videos": videos} if videos else {"images": images})
