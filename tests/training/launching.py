"""Runs of the real command line by several processes on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests.regimes import RECIPE

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    """``torchrun ... ARGUMENTS`` in ``folder``, or python alone for one process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


def train(folder: Path, output: str, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess:
    """``flamingo-ft train`` of the folder's recipe."""
    command = ("-m", "flamingo_ft", "train", "./recipe.yaml", f"train.output_dir={output}", *overrides)
    return launch(folder, *command, processes=processes)


def losses(folder: Path) -> list[float]:
    """Of each step of a run."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def write_data(folder: Path, media: Sequence[Sequence[int]]) -> list[dict]:
    """A recipe, and a row for each of ``media``: how many frames each medium in it has; 0: an image."""
    for shade in range(4):
        Image.new("RGB", (32, 32), (30 + 60 * shade,) * 3).save(folder / f"{shade}.png")
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
