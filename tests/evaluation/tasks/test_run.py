"""Every task is asked as its protocol says, and its scores follow from the answers."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flamingo_ft.adapters import save_adapter
from flamingo_ft.cli import main
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation import variants
from flamingo_ft.evaluation.metrics import METRICS, Ranked
from flamingo_ft.evaluation.results import AFTER, BLANK, SHUFFLED
from flamingo_ft.evaluation.tasks import TASKS, Example, few_shot_prompt, find_task
from flamingo_ft.evaluation.tasks.evaluate import evaluate_task
from flamingo_ft.evaluation.tasks.features import image_features
from flamingo_ft.evaluation.tasks.run import (
    CONTROLS,
    SHUFFLED_DEMONSTRATIONS,
    VOTE,
    Asked,
    Protocol,
    controls_of,
    prepare,
    questions_of_task,
    run_task,
)
from flamingo_ft.evaluation.tasks.scores import metrics_of, over_seeds, task_record
from flamingo_ft.inference import predictor as predictors
from flamingo_ft.inference.predictor import Predictor
from tests.inference.conftest import make_flamingo

from .published import write_image


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*make_flamingo(), batch_size=4, image_cache_mib=1)


def asked(predictor, task, published, **options):
    protocol = Protocol(**options)
    return prepare(predictor, task, published[task.name], protocol), protocol


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_asked_and_scored_with_its_controls(predictor, published, name):
    task = find_task(name)
    prepared, protocol = asked(predictor, task, published, shots=1 if task.train_split else 0, max_samples=3)
    run = run_task(predictor, task, prepared, protocol, controls_of(prepared))
    record = task_record(run, metrics_of(task))
    assert json.loads(json.dumps(record)) and record["samples"] == len(prepared.examples) > 0
    assert set(record["scores"]) == set(task.metrics) <= set(METRICS)
    ranked = [isinstance(answer, Ranked) for answer in run.answers[AFTER]]
    assert all(ranked) if task.ranks_labels else not any(ranked)


def test_generated_answers_are_those_of_the_few_shot_prompts_cut(predictor, published):
    task = find_task("vqav2")
    prepared, protocol = asked(predictor, task, published, shots=2)
    run = run_task(predictor, task, prepared, protocol)
    for example, shown, answer in zip(
        prepared.examples, prepared.demonstrations, run.answers[AFTER], strict=True
    ):
        (text,) = predictor.answer([few_shot_prompt(task, example, shown)], **task.decoding)
        assert answer == task.cut(text) and len(shown) == 2


def test_no_shots_show_two_demonstrations_without_images_and_a_chat_none(predictor, published):
    task = find_task("vqav2")
    prepared, protocol = asked(predictor, task, published)
    assert {len(shown) for shown in prepared.demonstrations} == {2}
    assert {len(question.images) for question in questions_of_task(task, prepared, protocol)} == {1}
    prepared, protocol = asked(predictor, task, published, form="chat")
    (first, *_) = questions_of_task(task, prepared, protocol)
    assert [message["role"] for message in first.messages] == ["user"]


def test_labels_are_ranked_by_their_log_likelihood_per_token(predictor, published):
    task = find_task("imagenet")
    prepared, protocol = asked(predictor, task, published)
    run = run_task(predictor, task, prepared, protocol)
    for question, answer, example in zip(run.questions, run.answers[AFTER], prepared.examples, strict=True):
        scores = predictor.rank([question], example.labels, with_end=False, per_token=True)[0]
        assert list(answer.scores.values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_controls_change_what_they_are_named_for(predictor, published, monkeypatch):
    task = find_task("vqav2")
    prepared, protocol = asked(predictor, task, published, shots=2)
    seen = []
    monkeypatch.setattr(
        "flamingo_ft.evaluation.tasks.run.answers_of_task",
        lambda predictor, task, asked, questions, **options: seen.append(asked) or ["x"] * len(questions),
    )
    assert controls_of(prepared) == list(CONTROLS)
    run_task(predictor, task, prepared, protocol, controls_of(prepared))
    own, other, blank, shuffled = seen
    assert own is prepared
    images = [example.images for example in prepared.examples]
    assert all(
        ours != theirs.images or len(set(images)) == 1
        for ours, theirs in zip(images, other.examples, strict=True)
    )
    assert all(isinstance(image, bytes) for example in blank.examples for image in example.images)
    assert [example.question for example in shuffled.examples] == [one.question for one in own.examples]
    assert shuffled.demonstrations != own.demonstrations


@pytest.mark.parametrize("name, shots", [("vqav2", 1), ("imagenet", 3)])
def test_the_vote_of_the_demonstrations_is_scored_beside_the_model(predictor, published, name, shots):
    task = find_task(name)
    prepared, protocol = asked(predictor, task, published, shots=shots)
    run = run_task(predictor, task, prepared, protocol, [VOTE])
    for shown, vote in zip(prepared.demonstrations, run.answers[VOTE], strict=True):
        answers = [example.references[0] for example in shown]
        most = max(map(answers.count, answers))
        assert str(vote) == [answer for answer in answers if answers.count(answer) == most][-1]
    (score, *_) = task_record(run, metrics_of(task))["scores"].values()
    assert 0 <= score["controls"][VOTE]["value"] <= 1


def test_a_control_that_cannot_change_anything_is_left_out():
    text = Example("row", (), "Why?", ("a",))
    image = replace(text, images=("a.png",))
    assert controls_of(Asked([text], [()])) == []
    assert controls_of(Asked([image], [()])) == [SHUFFLED, BLANK]
    assert controls_of(Asked([text], [(text,)])) == [VOTE]
    assert controls_of(Asked([text], [(text, text)])) == [SHUFFLED_DEMONSTRATIONS, VOTE]


def test_a_value_lies_in_its_interval_and_differences_are_those_of_the_controls(predictor, published):
    task = find_task("pope")
    prepared, protocol = asked(predictor, task, published)
    run = run_task(predictor, task, prepared, protocol, [BLANK])
    right = [example.references[0] for example in prepared.examples]
    run.answers[AFTER], run.answers[BLANK] = list(right), [*right[:-1], "perhaps"]
    score = task_record(run, metrics_of(task))["scores"]["accuracy"]
    wrong = 1 / len(right)
    assert (score["value"], score["low"], score["high"]) == (1, 1, 1)
    control = score["controls"][BLANK]
    assert control["value"] == pytest.approx(1 - wrong)
    assert control["difference"]["value"] == pytest.approx(-wrong)
    assert control["difference"]["low"] <= -wrong <= control["difference"]["high"] <= 0


def test_seeds_are_summarized_by_their_mean_and_deviation():
    records = [
        {"shots": shots, "seed": seed, "scores": {"accuracy": {"value": value}}}
        for shots, seed, value in ((0, 0, 0.5), (0, 1, 0.7), (4, 0, None))
    ]
    first, second = over_seeds(records)
    assert first["mean"] == pytest.approx(0.6) and first["deviation"] == pytest.approx(0.2 / np.sqrt(2))
    assert (second["shots"], second["mean"], second["deviation"]) == (4, None, None)


def test_the_nearest_demonstration_of_a_training_image_is_itself(predictor, published, tmp_path, monkeypatch):
    task = find_task("vqav2")
    train = task.train_examples(task.open(published["vqav2"]))
    monkeypatch.setattr(type(task), "eval_examples", lambda self, folder: train)
    protocol = Protocol(shots=1, choice="rices")
    prepared = prepare(predictor, task, published["vqav2"], protocol, cache=tmp_path)
    for example, shown in zip(prepared.examples, prepared.demonstrations, strict=True):
        assert shown[-1].images == example.images
    text = [replace(example, images=()) for example in train]
    monkeypatch.setattr(type(task), "train_examples", lambda self, folder: text)
    with pytest.raises(UserError, match="demonstrations: rices compares images, but some rows have none"):
        prepare(predictor, task, published["vqav2"], protocol, cache=tmp_path)


def test_features_are_kept_until_an_image_changes(predictor, tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{number}{name}.png") for number, name in enumerate(("red", "sky", "sea"))]
    for path in paths:
        write_image(tmp_path / path)
    first = image_features(predictor, paths, tmp_path / "kept")
    assert first.shape == (3, predictor.model.config.vision_width)
    with monkeypatch.context() as patched:
        patched.setattr("flamingo_ft.evaluation.tasks.features.encode_distinct", lambda *_: 1 / 0)
        np.testing.assert_array_equal(image_features(predictor, paths, tmp_path / "kept"), first)
    (tmp_path / "2sea.png").write_bytes((tmp_path / "0red.png").read_bytes() + b"x")
    changed = image_features(predictor, paths, tmp_path / "kept")
    np.testing.assert_allclose(changed[[0, 1, 0]], changed, atol=1e-6)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_features_of_tiled_images_are_of_the_whole_image(thumbnail, predictor, tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    page = Image.new("RGB", (64, 64))
    page.paste((255, 0, 0), (32, 32, 64, 64))  # in the last of four tiles
    page.save(path)
    page.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "small.png")
    monkeypatch.setattr(
        predictor.processor.image_processor, "tiles", {"max_tiles": 4, "thumbnail": thumbnail}
    )
    (tiled,) = image_features(predictor, [path], tmp_path / "kept")
    monkeypatch.setattr(predictor.processor.image_processor, "tiles", None)
    (small,) = image_features(predictor, [str(tmp_path / "small.png")], tmp_path / "kept")
    np.testing.assert_allclose(tiled, small, atol=1e-5)


# --- the command ---


@pytest.fixture
def loaded(predictor, monkeypatch):
    monkeypatch.setattr(predictors.Predictor, "from_pretrained", lambda folder, **options: predictor)
    monkeypatch.setattr(variants, "fetch_model", Path)


def test_the_command_writes_scores_and_answers(loaded, published, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = [
        "--data",
        str(published["vqav2"]),
        "--shots",
        "0",
        "--shots",
        "2",
        "--seed",
        "0",
        "--seed",
        "1",
    ]
    assert main(["eval", "run", "vqav2", "eval.max_samples=2", *options, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "vqav2" in output and "mean ± deviation of 2 seeds" in output
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["shots"], run["seed"]) for run in record["runs"]] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == sum(run["samples"] for run in record["runs"])
    assert {SHUFFLED, BLANK, AFTER} < set(rows[0]) and SHUFFLED not in rows[-1]


def test_variants_are_asked_the_same_prompts_of_the_first_seed(predictor, published, tmp_path, monkeypatch):
    model = tmp_path / "run"
    save_adapter(predictor.model, predictor.processor, model)
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    options = ["--shots", "0", "--shots", "1", "--seed", "3", "--seed", "4", "--compare", "base", "--card"]
    command = ["eval", str(model), "vqav2", "eval.max_samples=2", "--data", str(published["vqav2"]), *options]
    assert main([*command, "--out", str(out), "--no-controls"]) == 0
    record = json.loads((out / "results.json").read_text())
    compared = [(each["shots"], each["name"]) for each in record["variants"]]
    assert compared == [(0, str(model)), (0, "base"), (1, str(model)), (1, "base")]
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    prompts = defaultdict(list)
    for row in rows:
        prompts[row["model"], row["shots"], row["seed"]].append((row["where"], row["prompt"]))
    assert len(prompts) == 4 + 2
    for shots in (0, 1):
        assert prompts["base", shots, 3] == prompts[str(model), shots, 3]
    card = (model / "README.md").read_text()
    assert card.count("## Scores on") == 2 and "## Scores on VQAv2 (validation), 1 shot\n" in card
    assert all((out / f"results_{shots}_shots.html").read_text().count("base") for shots in (0, 1))


def test_the_same_run_gives_the_same_scores(loaded, published):
    runs = [
        evaluate_task("run", "scienceqa", published["scienceqa"], Protocol(), shots=(1,), controls=False)
        for _ in range(2)
    ]
    for run in runs:
        del run["runs"][0]["samples_per_second"]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqav3", "--data", "{root}"], "task: got 'vqav3'; use one of vqav2"),
        (["vqav2"], "--data: missing; name the folder with v2_OpenEnded"),
        (["vqav2", "train.max_steps=1", "--data", "{root}"],
         "override train.max_steps: a task does not use it; it uses eval.batch_size, eval.max_samples"),
        (["vqav2", "eval.max_samples=0", "--data", "{root}"],
         "override eval.max_samples: must be 1 or more, got 0; correct it"),
        (["vqav2", "--data", "{root}", "--metric", "blue"], "blue"),
        (["pope", "--data", "{pope}", "--shots", "4"],
         "pope: has no training rows to draw demonstrations from, got 4 shots; set shots to 0"),
        (["pope", "--data", "{root}"], "coco_pope_"),
        (["--shots", "4"], "--shots: only used with a task, such as vqav2; name one, or remove it"),
        (["vqav2", "--data", "{root}", "--image-root", "{root}"],
         "--image-root: not used with a task, whose files name their images; remove it"),
        (["--image-root", "{root}"], "--image-root: only used with --data; add it, or remove this"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(loaded, published, tmp_path, capsys, arguments, message):
    places = {"root": tmp_path, "pope": published["pope"]}
    assert main(["eval", "run", *(part.format(**places) for part in arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
