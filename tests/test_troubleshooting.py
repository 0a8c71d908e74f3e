"""Every command of docs/troubleshooting.md runs, in its order, on one small project."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from flamingo_ft import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SHORT = {
    "train": ["train.max_steps=2", "train.warmup_steps=0", "train.batch_size=2", "eval.max_samples=4"],
    "eval": ["eval.max_samples=20"],
    "merge": ["--samples=8"],
}
PLACEHOLDERS = ("CHECKPOINT",)
ROWS = 400


def commands() -> list[list[str]]:
    found = re.findall(r"`(flamingo-ft [^`]+)`", PAGE.read_text(encoding="utf-8"))
    arguments = [shlex.split(command.replace(r"\|", "|"))[1:] for command in dict.fromkeys(found)]
    return [one for one in arguments if not set(PLACEHOLDERS) & set(one)]


def test_each_row_names_what_shows_it_or_what_fixes_it():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| **")]
    assert len(rows) >= 15 and len(commands()) >= 20
    assert all("`" in line.split("|", 2)[2] for line in rows)


@pytest.mark.slow
def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    data = [Path("recipes/quickstart", name) for name in ("train.jsonl", "eval.jsonl")]
    for file in data:  # thousands of rows, which most commands read
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:ROWS]))
    train, evaluated = map(str, data)
    assert cli.main(["recipes", "new", "mine.yaml", "--data", train, "--eval", evaluated]) == 0
    for command in commands():
        name, *_ = command
        short = SHORT.get(name, [])
        needs_run = {"--resume", "--overwrite", "model.init_from=runs/mine"} & {*command}
        if name == "train" and not needs_run:
            shutil.rmtree("runs/mine", ignore_errors=True)
        given = {argument.partition("=")[0] for argument in command}
        assert cli.main(command + [one for one in short if one.partition("=")[0] not in given]) == 0, command
