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
SHORT = {  # for all commands but the training of the quickstart
    "train": ["train.max_steps=3", "train.warmup_steps=1", "eval.max_samples=10"],
    "eval": ["eval.max_samples=10"],
    "merge": ["--samples=8"],
}
ROWS = 400
QUICKSTART = {"recipes/quickstart.yaml", "runs/quickstart"}
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
    return [*command, *SHORT.get(command[1], ())]


def run(command: list[str]) -> None:
    assert cli.main(command[1:]) == 0, command


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The current directory, with the recipes and their data."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_about_ones_own_data_runs(checkout):
    for name in ("train", "eval"):  # thousands of rows, which most commands read
        file = checkout / "recipes" / "quickstart" / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:ROWS]))
    others = [command for command in commands() if not QUICKSTART & {*command}]
    assert len(others) >= 9
    for command in others:
        run(shortened(command))


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy_and_every_command_about_it_runs(checkout):
    about = [command for command in commands() if QUICKSTART & {*command}]
    assert [command[1] for command in about] == ["train", "generate", "eval"]
    for command in about:
        run(command if command[1] == "train" else shortened(command))
    tasks = json.loads((checkout / "runs" / "quickstart" / "metrics.json").read_text())["eval"]["per_task"]
    for task in ("which_digit", "even_or_odd", "larger_than_five"):
        assert tasks[task]["accuracy"] >= 0.95, (task, tasks[task])
    for task in ("name_both", "same_digit"):
        assert tasks[task]["accuracy"] >= 0.80, (task, tasks[task])
    assert tasks["which_digit"]["shuffled_images"] <= 0.25
    assert tasks["which_digit"]["before"] <= 0.25
