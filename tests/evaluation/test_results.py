"""Exact match, the summary and the file of results, and the evaluation of adapters on disk."""

import json
from pathlib import Path

import pytest
from PIL import Image

from flamingo_ft.adapters import save_adapter
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.cli.metrics_table import evaluation_tables
from flamingo_ft.config import RECIPE_FILE, dump_recipe, load_recipe
from flamingo_ft.data import Sample, read_samples
from flamingo_ft.data.sample import UNNAMED_TASK
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.evaluate import evaluate_adapter, recipe_for_evaluation
from flamingo_ft.evaluation.metrics import exact_match, normalize
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.evaluation.results import Results, card_tables, load_predictions, score_tables
from flamingo_ft.inference.predictor import Predictor, Prompt
from flamingo_ft.model import build_flamingo
from tests.data.dialogues import IMAGE, assistant, user

PLAIN = {"free_text": False, "classes": None}  # of a task with few samples


def sample(task: str, answer: str, question: str = "Which?") -> Sample:
    return Sample([user(question), assistant(answer)], [], task, f"row of {task}")


@pytest.mark.parametrize(
    "prediction",
    ["Two and seven.", " two AND  seven", "two and\nseven!", "Two and seven .", "two and seven?!"],
)
def test_case_spaces_and_final_punctuation_do_not_count(prediction):
    assert exact_match(prediction, ["Two and seven."])


@pytest.mark.parametrize(
    "prediction", ["", "Two", "Two and seventeen.", "Seven and two.", "Two and seven. Yes.", "2 and 7"]
)
def test_other_words_are_wrong(prediction):
    assert not exact_match(prediction, ["Two and seven."])


def test_punctuation_inside_an_answer_counts():
    assert normalize("3.5") != normalize("35") and normalize("3.5.") == "3.5"
    assert normalize("STRASSE") == normalize("Straße")


def results():
    samples = [sample("b", "1"), sample("a", "1"), sample("b", "2"), sample("b", "é世🦩\n\u2028")]
    after, before, shuffled = ["1", "2", "2", "x"], ["", "1", "", ""], ["1", "1", "1", "1"]
    return Results(questions_of(samples), {"before": before, "after": after, "shuffled_images": shuffled})


def test_a_summary_has_every_accuracy_overall_and_per_task():
    assert results().summary() == {
        "accuracy": 0.5,
        "accuracy_before": 0.25,
        "accuracy_shuffled_images": 0.5,
        "accuracy_majority": 0.5,
        "verdict": None,
        "per_task": {
            "a": {
                "accuracy": 0.0,
                "samples": 1,
                "before": 1.0,
                "shuffled_images": 1.0,
                "majority": 1.0,
                **PLAIN,
            },
            "b": {
                "accuracy": 2 / 3,
                "samples": 3,
                "before": 0.0,
                "shuffled_images": 1 / 3,
                "majority": 1 / 3,
                **PLAIN,
            },
        },
    }


def test_a_summary_of_one_evaluation_has_no_other_conditions():
    questions = results().questions
    summary = Results(questions, {"after": ["1", "1", "2", "é世🦩"]}).summary()
    assert summary["accuracy"] == 1.0 and set(summary) == {"accuracy", "accuracy_majority", "per_task"}
    assert summary["per_task"]["a"] == {
        "accuracy": 1.0,
        "samples": 1,
        "majority": 1.0,
        **PLAIN,
    }


@pytest.mark.parametrize("task", [UNNAMED_TASK, "all", "accuracy"])
def test_every_question_counts_once_whatever_its_task_is_called(task):
    questions = questions_of([sample(task, "1"), sample("colour", "red"), sample("colour", "blue")])
    summary = Results(questions, {"after": ["1", "", ""]}).summary()
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert {name: each["accuracy"] for name, each in summary["per_task"].items()} == {
        task: 1.0,
        "colour": 0.0,
    }
    assert sum(each["samples"] for each in summary["per_task"].values()) == len(questions)


def test_questions_and_rows_are_both_counted_where_rows_have_several_questions():
    dialogue = Sample([user("1?"), assistant("1"), user("2?"), assistant("2")], [], "sum", "row 1")
    for samples, expected in (
        ([dialogue, sample("sum", "3")], "held-out samples: 3 questions in 2 rows"),
        ([sample("sum", "2"), sample("sum", "3")], "held-out samples"),
    ):
        questions = questions_of(samples)
        summary = Results(questions, {"after": ["1"] * len(questions)}).summary()
        (table,) = score_tables(summary)
        assert table.subject == expected and table.overall.samples == len(questions)
        assert evaluation_tables(summary)[0].title == f"accuracy on {expected}"
        assert card_tables(summary)[0].title == f"Accuracy on {expected}"


@pytest.mark.parametrize("task, name", [(UNNAMED_TASK, "all"), ("digit", "digit")])
def test_a_single_task_is_one_row_of_the_tables(task, name):
    summary = Results(questions_of([sample(task, "1")] * 2), {"after": ["1", "2"]}).summary()
    (table,) = evaluation_tables(summary)
    assert list(table.columns[0].cells) == [name] and table.row_count == 1
    assert [row[:2] for row in card_tables(summary)[0].rows] == [[name, "2"]]
    (table,) = evaluation_tables(results().summary())
    assert list(table.columns[0].cells) == ["a", "b", "all"]


def test_saved_answers_are_read_as_they_were(tmp_path):
    original = results()
    original.save(tmp_path)
    rows = load_predictions(tmp_path)
    assert [row["where"] for row in rows] == [question.where for question in original.questions]
    for name, answers in original.answers.items():
        assert [row[name] for row in rows] == answers
    assert [row["answer"] for row in rows] == ["1", "1", "2", "é世🦩\n\u2028"]
    assert {(row["question"], tuple(row["images"])) for row in rows} == {("Which?", ())}


RECIPE = """\
model:
  vision: {name: nano}
  language: {name: nano}
data:
  train: [{path: samples.jsonl}]
  eval: [{path: samples.jsonl}]
train: {output_dir: run, max_steps: 1}
eval: {batch_size: 2, max_new_tokens: 4}
"""


@pytest.fixture
def run(tmp_path):
    """The folder of a run: an untrained adapter and its recipe; beside it the held-out samples."""
    for index in range(3):
        Image.new("RGB", (32, 32), (80 * index,) * 3).save(tmp_path / f"{index}.png")
    rows = [
        {
            "messages": [user(IMAGE, "Which digit?"), assistant("Seven.")],
            "images": [f"{index}.png"],
            "task": "digit",
        }
        for index in range(3)
    ]
    rows.append({"messages": [user("Hello."), assistant("Good day.")]})
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    perceiver = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
    model, processor = build_flamingo(load_vision("nano"), load_language("nano"), perceiver=perceiver)
    save_adapter(model, processor, tmp_path / "run")
    (tmp_path / "run" / RECIPE_FILE).write_text(dump_recipe(load_recipe(tmp_path / "recipe.yaml")))
    return tmp_path, model.eval(), processor


def test_an_adapter_is_evaluated_by_its_own_answers(run, monkeypatch):
    folder, model, processor = run
    questions = questions_of(read_samples(folder / "samples.jsonl"))
    predictor = Predictor(model, processor, max_new_tokens=4)
    answers = [predictor.answer([question])[0] for question in questions]
    monkeypatch.chdir("/")
    metrics = evaluate_adapter(folder / "run")
    assert metrics["eval"] == Results(questions, {"after": answers}).summary()
    assert {task: each["samples"] for task, each in metrics["eval"]["per_task"].items()} == {
        "digit": 3,
        UNNAMED_TASK: 1,
    }


def test_an_adapter_can_be_evaluated_on_other_samples(run):
    folder, model, processor = run
    (reply,) = Predictor(model, processor).answer([Prompt([user("Hello.")], [])], max_new_tokens=4)
    rows = [{"messages": [user("Hello."), assistant(answer)]} for answer in (reply, reply, "something else")]
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "samples.jsonl").unlink()
    metrics = evaluate_adapter(str(folder / "run"), str(folder / "other.jsonl"))
    assert metrics["eval"]["accuracy"] == pytest.approx(2 / 3)


def test_an_adapter_without_a_recipe_is_evaluated_on_the_samples_it_is_called_with(run, monkeypatch):
    folder, _, _ = run
    whole = evaluate_adapter(folder / "run", folder / "samples.jsonl", ["eval.max_new_tokens=4"])["eval"]
    (folder / "run" / RECIPE_FILE).unlink()
    with pytest.raises(
        UserError, match="run: has no resolved_recipe.yaml, so no held-out samples; .* --data FILE"
    ):
        evaluate_adapter(folder / "run")
    again = evaluate_adapter(folder / "run", folder / "samples.jsonl", ["eval.max_new_tokens=4"])
    assert again["eval"] == whole
    monkeypatch.chdir(folder)
    named = ["data.eval=[{path: samples.jsonl, limit: 1}]"]
    assert evaluate_adapter(folder / "run", overrides=named)["eval"]["per_task"]["digit"]["samples"] == 1


def test_other_samples_take_every_key_of_a_source(run, monkeypatch):
    folder, _, _ = run
    for index in range(3):
        (folder / "photos").mkdir(exist_ok=True)
        (folder / f"{index}.png").rename(folder / "photos" / f"{index}.png")
    rows = [f"{index}.png,Which digit?,Seven." for index in range(3)]
    (folder / "other.csv").write_text("\n".join(["photo,q,answer", *rows]))
    monkeypatch.chdir(folder)
    keys = ["data.eval.0.format=vqa", "data.eval.0.image_root=photos"]
    keys.append("data.eval.0.columns={image: photo, question: q}")
    recipe = recipe_for_evaluation("run", folder / "run", "other.csv", keys)
    (source,) = recipe.data.eval
    assert (source.format, source.image_root) == ("vqa", folder / "photos")
    with pytest.raises(UserError, match="photo, q, answer; rename them to .* or name them: data.eval.0.col"):
        recipe_for_evaluation("run", folder / "run", "other.csv")
    assert recipe.eval.max_samples is None and recipe.eval.batch_size == 2
    samples = evaluate_adapter("run", "other.csv", [*keys, "eval.max_samples=2"])["eval"]["per_task"]
    assert sum(task["samples"] for task in samples.values()) == 2
    with pytest.raises(UserError, match="gone"):
        evaluate_adapter("run", "other.csv", ["data.eval.0.image_root=gone"])
    by_argument = evaluate_adapter(
        "run", "other.csv", [keys[0], keys[2], "eval.max_samples=2"], image_root=Path("photos")
    )
    assert by_argument["eval"]["per_task"] == samples


def test_a_folder_of_one_folder_per_class_is_evaluated_like_the_file_of_its_rows(run):
    folder, _, _ = run
    rows = []
    for index, name in enumerate(("one", "two", "two")):
        (folder / "classes" / name).mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").rename(folder / "classes" / name / f"{index}.png")
        rows.append({"image": f"classes/{name}/{index}.png", "caption": name})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    by_folder, by_file = (
        evaluate_adapter(folder / "run", folder / name)["eval"] for name in ("classes", "rows.jsonl")
    )
    assert by_folder == by_file and sum(task["samples"] for task in by_folder["per_task"].values()) == 3
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        evaluate_adapter(folder / "run", folder / "empty")


def test_evaluation_does_not_need_the_training_file(run):
    folder, _, _ = run
    file = folder / "run" / RECIPE_FILE
    text = file.read_text().replace("samples.jsonl", "gone.jsonl", 1)
    assert text.count("gone.jsonl") == text.count("samples.jsonl") == 1
    file.write_text(text)
    assert evaluate_adapter(folder / "run")["eval"]["per_task"]["digit"]["samples"] == 3


@pytest.mark.parametrize(
    "key", ["train.max_steps=5", "model.language.name=x", "data.template=chat", "eval.steps=5", "a=1"]
)
def test_a_key_that_evaluation_does_not_use_is_refused_by_name(run, key):
    name = key.partition("=")[0]
    with pytest.raises(UserError, match=f"override {name}: evaluation does not use it; it uses data.eval, "):
        evaluate_adapter(run[0] / "run", overrides=[key])


def test_samples_that_evaluation_skips_are_named(run):
    folder, _, _ = run
    (folder / "1.png").write_bytes(b"no image")
    lines = []
    metrics = evaluate_adapter(folder / "run", overrides=["data.on_bad_sample=skip"], report=lines.append)
    assert metrics["eval"]["per_task"]["digit"]["samples"] == 2
    assert len(lines) == 1 and lines[0].startswith("skipped: ") and "1.png" in lines[0]
