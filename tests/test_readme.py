"""The README is right: its example and its commands run, and the files of its tree exist."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from flamingo_ft import cli
from flamingo_ft.config.library import packaged_recipes

from .recipe_needs import needs_the_hub

ROOT = Path(__file__).parents[1]
STEPS, SAMPLES = "train.max_steps=52", "eval.max_samples=40"  # a checkpoint at step 50, seconds of evaluation
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """The README's flamingo-ft commands in order, without those whose backbones come from the Hub."""
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split(" && ")]
    arguments = [shlex.split(line) for line in lines if line.startswith("flamingo-ft")]
    on_hub = {name for name, path in packaged_recipes().items() if needs_the_hub(path)}
    return [command for command in arguments if not on_hub & {Path(word).stem for word in command}]


def tree() -> list[str]:
    """The paths of the README's tree, from the root of the repository."""
    paths, parents = [], []
    for line in README.splitlines():
        if entry := re.fullmatch(r" {4}( *)([\w.]+/?)(?: {2,}\S.*)?", line):
            parents[len(entry[1]) // 2 :] = [entry[2]]
            paths.append("".join(parents))
    return paths


def test_the_python_example_runs(monkeypatch, capsys):
    (example,) = blocks("python")
    monkeypatch.chdir(ROOT)
    assert len(example.strip().splitlines()) <= 14
    exec(compile(example, "README.md", "exec"), {})
    assert "<image>Which digit?" in capsys.readouterr().out


def test_every_folder_and_file_of_the_tree_exists():
    paths = tree()
    assert len(paths) > 25 and "flamingo_ft/model/conditioning.py" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_packaged_recipe_is_in_the_table():
    first_cells = [line.split(" | ")[0] for line in README.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}`" in cell for cell in first_cells) for name in packaged_recipes())


def shortened(command: list[str]) -> list[str]:
    """Return the command, with fewer steps and samples for all but the training of the plain quickstart."""
    if command[1:] == ["train", "recipes/quickstart.yaml"]:
        return command
    return [*command, *{"train": (STEPS, SAMPLES), "eval": (SAMPLES,)}.get(command[1], ())]


@pytest.mark.slow
def test_every_command_runs_and_the_quickstart_reaches_its_accuracy(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    for command in commands():
        assert cli.main(shortened(command)[1:]) == 0, command
    tasks = json.loads((tmp_path / "runs" / "quickstart" / "metrics.json").read_text())["eval"]["per_task"]
    for task in ("which_digit", "even_or_odd", "larger_than_five"):
        assert tasks[task]["accuracy"] >= 0.95, (task, tasks[task])
    for task in ("name_both", "same_digit"):
        assert tasks[task]["accuracy"] >= 0.80, (task, tasks[task])
    assert tasks["which_digit"]["shuffled_images"] <= 0.25
    assert tasks["which_digit"]["before"] <= 0.25
