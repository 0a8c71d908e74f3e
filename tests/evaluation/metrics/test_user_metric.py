"""A user's metric is a function in a Python file: wherever a metric is shown, and refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flamingo_ft import cli, train
from flamingo_ft.adapters.files import read_processor
from flamingo_ft.config import RECIPE_FILE, load_recipe
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.evaluate import evaluate_adapter
from flamingo_ft.evaluation.merge_quality import eval_set_of_run
from flamingo_ft.evaluation.metrics import find_metrics, java
from flamingo_ft.evaluation.results import card_tables
from flamingo_ft.report import write_report
from flamingo_ft.report.run_folder import read_log
from flamingo_ft.training.resume import find_start_point
from tests import regimes

SHOUTING = """\
def shouting(prediction: str, references: list[str]) -> float:
    assert isinstance(references, list)
    return prediction.isupper() + 10.0 * len(references)
"""


def write(folder: Path, text: str = SHOUTING) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:shouting"


def refusal(name: str) -> str:
    (metric,) = find_metrics([name])
    with pytest.raises(UserError) as error:
        metric.statistics(["dog"], [["dog"]])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_function_gets_the_prediction_and_a_list_of_references(tmp_path):
    (metric,) = find_metrics([write(tmp_path)])
    assert metric.name == metric.label == "shouting" and metric.text(20.5) == "20.5"
    assert metric.statistics(["DOG", "dog"], [["dog", "cat"], ["dog"]]).tolist() == [21.0, 10.0]


BROKEN = {
    "no number": ("return 'much'", "must return a finite number, got 'much' for the answer 'dog'"),
    "nothing": ("pass", "must return a finite number, got None for the answer 'dog'"),
    "nan": ("return float('nan')", "must return a finite number, got nan for the answer 'dog'"),
    "an exception": ("return {}[prediction]", "failed on the answer 'dog', got KeyError: 'dog'"),
}


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN)
def test_a_function_that_fails_or_returns_no_number_is_named(tmp_path, line, message):
    name = write(tmp_path, f"def shouting(prediction, references):\n    {line}\n")
    assert refusal(name).startswith(f"{name}: {message}")


def test_a_file_that_is_not_there_or_cannot_be_run_or_lacks_the_function_is_named(tmp_path):
    assert refusal(f"{tmp_path}/mine.py:shouting").startswith(f"{tmp_path}/mine.py:shouting: no such file; ")
    name = write(tmp_path, "def whispering(p, r): return 0\n")
    assert refusal(name) == f"{name}: no function shouting, got whispering"
    name = write(tmp_path, "import not_a_module\n")
    assert refusal(name).startswith(f"{name}: the file cannot be run, got ModuleNotFoundError: ")
    assert "SyntaxError" in refusal(write(tmp_path, "def shouting(:\n"))


def test_a_function_called_like_another_metric_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("")
    for name in ("accuracy", "verdict", "f1_majority"):
        with pytest.raises(UserError, match=f"{name} is the name of other results; rename the function"):
            find_metrics([f"{tmp_path}/mine.py:{name}"])
    with pytest.raises(UserError, match="shouting is the name of other results"):
        find_metrics(["a.py:shouting", "b.py:shouting"])
    assert len(find_metrics(["a.py:shouting", "a.py:shouting", "f1"])) == 2


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A small recipe with its data, and a user's metric beside it."""
    regimes.write_run(tmp_path)
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVALUATED = ("data.eval=[{path: train.jsonl}]", "train.max_steps=2", "train.logging_steps=1")
SELECTS = "eval={steps: 2, metrics: [accuracy, mine.py:shouting], metric: mine.py:shouting, keep: best}"


def test_a_path_in_a_recipe_is_relative_to_it_and_is_not_published(here, monkeypatch):
    text = (here / "recipe.yaml").read_text()
    (here / "recipe.yaml").write_text(
        f"{text}eval: {{metrics: [accuracy, mine.py:shouting], metric: mine.py:shouting}}\n"
    )
    monkeypatch.chdir("/")
    recipe = load_recipe(here / "recipe.yaml")
    assert recipe.eval.metrics == ("accuracy", f"{here}/mine.py:shouting")
    assert recipe.eval.metric == f"{here}/mine.py:shouting"
    published = strip_recipe_paths(recipe.model_dump(mode="json"))["eval"]
    assert (published["metrics"], published["metric"]) == (
        ["accuracy", "mine.py:shouting"],
        "mine.py:shouting",
    )
    monkeypatch.chdir(here)
    given = load_recipe("recipe.yaml", ["eval.metrics=[mine.py:shouting]"])  # relative to this folder
    assert given.eval.metrics == (f"{here}/mine.py:shouting",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, whole_runs):
    """The folder of `here` with a run that kept the adapter with the best value of the metric."""
    folder = tmp_path_factory.mktemp("shouting")
    regimes.write_run(folder)
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(regimes.recipe(*EVALUATED, SELECTS))
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of `trained` as the current directory; its recipe still names the file in `trained`."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_users_metric_is_everywhere_that_a_registered_one_is(run):
    metrics = json.loads(Path("run/metrics.json").read_text())
    record = metrics["eval"]
    assert metrics["train"]["best"] == {"step": 2, "shouting": pytest.approx(record["shouting"])}
    assert record["user_metrics"] == ["shouting"] and record["shouting_majority"] == 10.0
    assert {"shouting", "shouting_before", "shouting_shuffled_images"} <= {*record}
    assert [entry["eval_shouting"] for entry in read_log(run / "run") if "eval_loss" in entry]
    assert Path("run/figures/shouting.png").is_file()
    assert "Shouting on held-out samples" in Path("run/report.html").read_text()
    assert "Shouting on held-out samples" in Path("run/README.md").read_text()
    assert [table.title.split()[0] for table in card_tables(record)] == ["Accuracy", "Shouting"]


@pytest.fixture
def moved(run, trained):
    """The same run where the file is not: on another machine, or after it was deleted."""
    recipe = run / "run" / RECIPE_FILE
    recipe.write_text(recipe.read_text().replace(str(trained), str(run)))
    (run / "mine.py").unlink()
    return run


def test_what_is_written_needs_the_users_file_no_more(moved):
    assert "Shouting on held-out samples" in write_report("run").read_text()
    assert find_start_point(load_recipe("run/resolved_recipe.yaml")).finished


def test_another_evaluation_needs_the_users_file_or_other_metrics(moved):
    with pytest.raises(UserError, match="mine.py:shouting: no such file"):
        evaluate_adapter("run")
    values = evaluate_adapter("run", overrides=["eval.metrics=[accuracy]"])["eval"]
    assert "accuracy" in values and "shouting" not in values


def test_a_merge_reports_a_users_metric_unless_its_file_is_gone(moved):
    def names():
        eval_set = eval_set_of_run(Path("run"), read_processor(Path("run")), context=512, samples=2)
        assert eval_set is not None
        return [metric.name for metric in eval_set.metrics]

    assert names() == ["accuracy"]
    write(moved)
    assert names() == ["accuracy", "shouting"]


@pytest.mark.slow
def test_a_merge_compares_and_prints_a_users_metric(run, capsys):
    assert cli.main(["merge", "run", "merged"]) == 0
    assert "shouting" in capsys.readouterr().out
    cost = json.loads(Path("merged/merge.json").read_text())["cost"]
    assert cost["user_metrics"] == ["shouting"] and cost["shouting"]["merged"] >= 10.0
    assert cost["shouting_margin"] is None


def test_eval_takes_more_metrics_on_the_command_line(run, capsys):
    options = ["eval.metrics=[accuracy]", "--metric", "mine.py:shouting", "--metric", "anls"]
    assert cli.main(["eval", "run", *options]) == 0
    output = capsys.readouterr().out
    assert all(f"{label} on held-out samples" in output for label in ("accuracy", "shouting", "ANLS"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cidre", "metric: must be 'accuracy', "),
        ("loss", "metric: must be 'accuracy', "),
        ("roc_auc", "roc_auc: needs a score for each label, got generated answers; "),
        ("gone.py:howling", "gone.py:howling: no such file; "),
        ("meteor", "meteor: needs pycocoevalcap and a Java; pip install 'flamingo_ft[metrics]'"),
    ],
)
def test_eval_refuses_a_metric_in_one_line(run, capsys, monkeypatch, name, message):
    monkeypatch.setattr(java, "_installed_tools", lambda: None)
    assert cli.main(["eval", "run", "--metric", name]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_metric_that_fails_ends_a_run_before_training(here):
    write(here, "def shouting(prediction, references):\n    return prediction['x']\n")
    with pytest.raises(UserError, match="mine.py:shouting: failed on the answer 'Dark.', got TypeError"):
        train(regimes.recipe(*EVALUATED, "eval.metrics=[mine.py:shouting]"))
    assert not Path("run/log.jsonl").exists()
