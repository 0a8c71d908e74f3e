"""The command line parses, calls and prints; a mistake costs one line, exit code 2 and no heavy import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import flamingo_ft
from flamingo_ft import cli, evaluation, inference, training
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.errors import UserError

RECIPE = """\
# Teach one thing
model: {vision: {name: nano}, language: {name: nano}}
data: {train: [{path: train.jsonl}]}
train: {output_dir: run, max_steps: 2}
"""
METRICS = {
    "eval": {
        "accuracy": 0.97,
        "accuracy_before": 0.31,
        "accuracy_shuffled_images": 0.29,
        "accuracy_majority": 0.33,
        "verdict": "reads the images: 97.0 % right, against 29.0 % with another image",
        "per_task": {
            "which digit": {
                "accuracy": 0.981,
                "before": 0.1,
                "shuffled_images": 0.12,
                "samples": 360,
            },
            "even or odd": {
                "accuracy": 0.96,
                "before": 0.5,
                "shuffled_images": 0.49,
                "majority": 0.53,
                "samples": 360,
                "classes": {
                    "Even.": {"accuracy": 0.95, "samples": 190, "predicted": 185},
                    "Odd.": {"accuracy": 0.97, "samples": 170, "predicted": 175},
                },
            },
        },
    },
    "train": {"steps": 600, "seconds": 171.6, "trainable_parameters": 1234567},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own current directory with a recipe, its data and an image."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def entry_point(monkeypatch):
    """Put a stand-in for an entry point where the command line looks for it; returns the list of calls."""

    def replace(package, module: str, function: str, answer):
        calls = []

        def stand_in(*arguments, **options):
            calls.append(arguments)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        stand_in_module = SimpleNamespace(**{function: stand_in})
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{module}", stand_in_module)
        monkeypatch.setattr(package, module, stand_in_module, raising=False)
        return calls

    return replace


HEAVY = {"torch", "transformers", "open_clip", "matplotlib", "datasets"}
RUN_ALL = f"""
import contextlib, io, json, sys
from flamingo_ft.cli import main
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue(), sorted({HEAVY} & set(sys.modules))]))
"""


@dataclass
class Result:
    """What a command returned and wrote, and the heavy modules imported by then."""

    code: int
    out: str
    err: str
    imported: list[str]


def run_all(commands: Sequence[Sequence[str]]) -> list[Result]:
    """Run commands one after the other in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(flamingo_ft.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(commands), capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    results = [Result(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(results) == len(commands), done.stderr
    return results


# --- cost and form of help and refusals ---


def test_help_comes_without_heavy_imports(here):
    verbs = ("train", "plan", "check", "eval", "generate", "chat", "recipes")
    commands = [[], ["--help"], ["--version"], *([verb, "--help"] for verb in verbs)]
    results = run_all(commands)
    for arguments, result in zip(commands, results, strict=True):
        assert (result.code, result.err, result.imported) == (0, "", []), arguments
    assert all(verb in results[1].out for verb in verbs)


MISTAKES = [
    (["train", "recipe.yaml", "train.max_step=3"], "did you mean train.max_steps?"),
    (["train", "recipe.yaml", "train.max_steps=ten"], "must be a whole number, got 'ten'"),
    (
        ["train", "recipe.yaml", "data.train.0.path=gone"],
        "relative paths here start from the current directory",
    ),
    (["train", "recipe.yaml", "max_steps"], "must be KEY=VALUE"),
    (["train", "gone.yaml"], "recipe gone.yaml: "),
    (["plan", "recipe.yaml", "train.batch_size=0"], "must be 1 or more, got 0"),
    (["plan", "recipe.yaml", "--text-tokens", "0"], "Invalid value for '--text-tokens'"),
    (["train", "recipe.yaml", "train.output_dir=."], "holds files but no run; choose another"),
    (["train", "recipe.yaml", "train.output_dir=a.png"], "a.png is a file; choose another"),
    (["train"], "Missing argument 'RECIPE'; see flamingo-ft train --help"),
    (["train", "recipe.yaml", "--overwrit"], "No such option: --overwrit"),
    (["tarin"], "No such command 'tarin'"),
    (
        ["eval", "run", "--data", "gone.jsonl"],
        "'gone.jsonl' does not exist; see flamingo-ft eval --help",
    ),
    (["generate", "run", "--prompt", "?", "--image", "gone.png"], "path 'gone.png' does not exist"),
    (["generate", "run"], "--prompt: missing; ask something, or name an --image to caption"),
    (["generate", "run", "--data", "a.png"], "--out: missing; name the file to write the answers to"),
    (["chat"], "Missing argument 'ADAPTER'"),
    (["generate", "run", "--prompt", "?", "--max-new-tokens", "0"], "greater than or equal to 1"),
    (["recipes", "copy", "gone"], "recipe"),
    (["merge", "run"], "Missing argument 'OUT'"),
    (["merge", "run", "out", "--base", "int8"], "'int8' is not one of 'bf16', 'dequantized'"),
    (["plan", "recipe.yaml", "train.max_step=3"], "did you mean train.max_steps?"),
    (["check", "recipe.yaml", "data.too_lon=error"], "did you mean data.too_long?"),
]


def test_a_mistake_is_one_line_with_exit_code_2_and_no_heavy_import(here):
    results = run_all([arguments for arguments, _ in MISTAKES])
    for (arguments, expected), result in zip(MISTAKES, results, strict=True):
        assert (result.code, result.out, result.imported) == (2, "", []), arguments
        (line,) = result.err.splitlines()
        assert line.startswith("error: ") and expected in line


def test_each_problem_of_a_recipe_is_an_error_line_of_its_own(here, capsys):
    assert cli.main(["train", "recipe.yaml", "train.seed=x", "train.max_steps=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: override train.") for line in lines)


def test_the_package_runs_as_a_module(here):
    environment = {**os.environ, "PYTHONPATH": str(Path(flamingo_ft.__file__).parents[1])}
    command = [sys.executable, "-m", "flamingo_ft", "train", "gone.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stderr.startswith("error: recipe gone.yaml: ")


# --- errors from inside ---


@pytest.mark.parametrize(
    "error, expected",
    [
        (UserError("sample 3 of x.jsonl: no image"), "error: sample 3 of x.jsonl: no image\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.png"),
            "error: x.png: No such file or directory\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied\n"),
    ],
)
def test_a_user_error_from_inside_the_package_is_printed_like_any_other(
    here, entry_point, capsys, error, expected
):
    entry_point(inference, "answer", "answer_with_boxes", error)
    assert cli.main(["generate", "run", "--prompt", "?"]) == 2
    assert capsys.readouterr().err == expected


def test_a_folder_as_the_image_names_the_option_for_folders(here, capsys):
    (here / "photos").mkdir()
    assert cli.main(["generate", "run", "--prompt", "?", "--image", "a.png", "--image", "photos"]) == 2
    expected = "error: --image: photos is a folder; name a file, or ask about every image of the folder with"
    assert capsys.readouterr().err == f"{expected} --data photos --out answers.jsonl\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError("a bug"), FileNotFoundError("a bug"), KeyError("a bug")]
)
def test_an_error_that_is_not_the_users_keeps_its_traceback(here, entry_point, error):
    entry_point(inference, "answer", "answer_with_boxes", error)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["generate", "run", "--prompt", "?"])


def test_an_interrupt_ends_with_130_and_a_line(here, entry_point, capsys):
    entry_point(training, "train", "train", KeyboardInterrupt())
    assert cli.main(["train", "recipe.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- verbs ---


def test_train_passes_the_recipe_on_and_prints_the_metrics(here, entry_point, capsys):
    calls = entry_point(training, "train", "train", METRICS)
    assert cli.main(["train", "recipe.yaml", "train.max_steps=3", "train.learning_rate=1e-3"]) == 0
    ((recipe, _),) = calls
    assert (recipe.train.max_steps, recipe.train.learning_rate) == (3, 1e-3)
    assert Path("run").is_dir()
    output = capsys.readouterr().out
    for cell in ("before", "after", "with another image", "98.1 %", "10.0 %", "12.0 %", "97.0 %", "720"):
        assert cell in output
    assert "even or odd: 'Even.' 95.0 % of 190, 'Odd.' 97.0 % of 170" in output
    assert "verdict: reads the images: 97.0 % right, against 29.0 % with another image" in output
    assert "majority" in output and "53.0 %" in output and "33.0 %" in output
    assert "trained 1,234,567 parameters for 600 steps in 172 s" in output
    assert "flamingo-ft generate run --image FILE" in output


def test_train_never_overwrites_a_run_silently(here, entry_point, capsys):
    calls = entry_point(training, "train", "train", METRICS)
    Path("run").mkdir()
    Path("run", RECIPE_FILE).write_text("an earlier run")
    assert cli.main(["train", "recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert calls == [] and "train.output_dir=FOLDER" in error and "--overwrite" in error
    assert cli.main(["train", "recipe.yaml", "--overwrite"]) == 0
    assert Path("run.old-1", RECIPE_FILE).read_text() == "an earlier run"
    assert f"moved the earlier run to {here / 'run.old-1'}" in capsys.readouterr().err


def test_eval_prints_only_what_was_measured(here, entry_point, capsys):
    measured = {"eval": {"accuracy": 0.5, "per_task": {"which digit": {"accuracy": 0.5, "samples": 2}}}}
    calls = entry_point(evaluation, "evaluate", "evaluate_adapter", measured)
    assert cli.main(["eval", "run", "--data", "train.jsonl"]) == 0
    assert [call[:3] for call in calls] == [("run", Path("train.jsonl"), ())]
    output = capsys.readouterr().out
    assert "accuracy" in output and "50.0 %" in output and "before" not in output and "another" not in output


def test_eval_without_data_leaves_the_choice_to_the_adapter(here, entry_point):
    calls = entry_point(evaluation, "evaluate", "evaluate_adapter", METRICS)
    assert cli.main(["eval", "run", "eval.batch_size=2"]) == 0
    assert [call[:3] for call in calls] == [("run", None, ["eval.batch_size=2"])]


def test_eval_passes_the_variants_on_and_prints_them(here, entry_point, capsys):
    score = {
        "metric": "accuracy",
        "questions": "all",
        "samples": 400,
        "value": 0.97,
        "low": 0.95,
        "high": 0.98,
    }
    difference = {"value": -0.66, "low": -0.71, "high": -0.61}
    base = score | {"value": 0.31, "low": 0.27, "high": 0.36, "difference": difference}
    variants = [
        {"name": "run", "scores": [score], "verdict": "reads the images"},
        {"name": "base", "scores": [base], "verdict": "the model is not looking"},
    ]
    variants = [record | {"quantization": None, "samples_per_second": 41.2} for record in variants]
    calls = entry_point(evaluation, "evaluate", "evaluate_adapter", METRICS | {"variants": variants})
    assert cli.main(["eval", "run", "--compare", "base"]) == 0
    assert len(calls) == 1
    output = capsys.readouterr().out
    for cell in ("Accuracy, 400 questions", "97.0 % (95.0 to 98.0)", "-66.0 (-71.0 to -61.0)", "41.2"):
        assert cell in output
    assert "run: reads the images" in output and "base: the model is not looking" in output


def test_generate_prints_the_answer_alone_and_keeps_the_order_of_images(here, entry_point, capsys):
    calls = entry_point(inference, "answer", "answer_with_boxes", ("a three [and] a four", []))
    options = ["--image", "b.png", "--image", "a.png", "--prompt", "Which digits?", "--max-new-tokens", "5"]
    assert cli.main(["generate", "run", *options]) == 0
    assert calls == [("run", [Path("b.png"), Path("a.png")], "Which digits?")]
    assert capsys.readouterr().out == "a three [and] a four\n"


def test_recipes_are_listed_with_what_they_do_and_copied_by_name(here, monkeypatch, capsys):
    library = here / "library"
    (library / "one").mkdir(parents=True)
    (library / "one.yaml").write_text(RECIPE.replace("train.jsonl", "one/train.jsonl"))
    monkeypatch.setattr("flamingo_ft.config.library.library_folder", lambda: library)
    assert cli.main(["recipes"]) == 0
    assert "one" in (output := capsys.readouterr().out) and "Teach one thing" in output
    assert cli.main(["recipes", "copy", "one", "mine"]) == 0
    assert capsys.readouterr().out.split() == ["mine/one.yaml", "mine/one"]
    assert cli.main(["recipes", "copy", "one", "mine"]) == 2
    assert "mine/one.yaml: exists already" in capsys.readouterr().err


def test_thousands_of_arguments_from_a_shell_pattern_are_not_all_echoed(here, capsys):
    images = [f"photos/{number:05}.png" for number in range(10_000)]
    for name in ("a.png", *images[:1]):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert cli.main(["generate", "runs/a", "--prompt", "What?", "--image", "a.png", *images]) == 2
    error = capsys.readouterr().err
    assert len(error) < 500 and "photos/00000.png" in error and "repeat an option" in error
