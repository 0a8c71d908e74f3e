"""The probe says what the frozen tower can tell: all, nothing, or not to be asked."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flamingo_ft import cli
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config import dump_recipe, load_recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.feature_cache import FrozenTower
from flamingo_ft.data.sample import Box
from flamingo_ft.evaluation import probe_questions
from flamingo_ft.evaluation.image_use import REMEDY
from flamingo_ft.evaluation.probe import Probe, ProbeResult, find_probe, load_probe, probe_question
from flamingo_ft.evaluation.probe_questions import choose_questions, media_of
from flamingo_ft.evaluation.probe_verdict import add_to_verdict, compare_with_tower, tower_lines
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.evaluation.results import Results
from flamingo_ft.evaluation.tower_tokens import TowerTokens, read_tokens
from flamingo_ft.model.processor import FlamingoImageProcessor
from flamingo_ft.model.tiles import Tiling
from flamingo_ft.report.run_folder import RunFolder
from flamingo_ft.training.output_dir import prepare_output_dir
from flamingo_ft.training.train import train
from tests.data.dialogues import IMAGE, assistant, user

COLOURS = ("red", "green", "blue")
QUESTION_KEYS = {
    *("question", "task", "wordings", "kind", "images", "train_samples", "eval_samples", "answers"),
    *("majority", "nearest_neighbour", "linear_pooled", "linear_attended", "best", "tells_apart"),
    "left_out",
}
PROBE_KEYS = {
    *("made_by", "recipe_digest", "tower", "tokens", "width", "media", "questions", "left_out"),
    *("tiled", "tower_seconds", "probe_seconds"),
}


def asked(answers, text="Which colour?", task="colour", images=1, first=0):
    """A question per answer, each about images of its own."""
    content = [*[IMAGE] * images, {"type": "text", "text": text}]
    return questions_of(
        [
            Sample(
                [user(*content), assistant(answer)],
                [f"{first + number}-{i}.png" for i in range(images)],
                task,
                f"row {number}",
            )
            for number, answer in enumerate(answers)
        ]
    )


def colours(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(COLOURS) for _ in range(count)]


def tokens_of(questions, separable: bool) -> TowerTokens:
    """Tokens (4, 6) of noise for each image, with its answer in them if they are to be separable."""
    generator = torch.Generator().manual_seed(0)
    found = TowerTokens({}, {})
    for question in questions:
        for sample in (*question.train, *question.eval):
            for medium in sample.images:
                tokens = torch.randn(4, 6, generator=generator)
                if separable:
                    tokens[:, COLOURS.index(sample.answer)] += 12
                found.mean[medium], found.tokens[medium] = tokens.mean(0), tokens.bfloat16()
    return found


def probed(separable: bool, images: int = 1) -> ProbeResult:
    train = asked(colours(120, 0), images=images)
    chosen = choose_questions(train, asked(colours(90, 1), images=images, first=500), 0)
    return probe_question(chosen.probed[0], tokens_of(chosen.probed, separable))


# --- figures


@pytest.mark.parametrize("images", [1, 2, 3])
def test_separable_answers_are_all_told_apart(images):
    result = probed(separable=True, images=images)
    shares = (result.nearest_neighbour, result.linear_pooled, result.linear_attended, result.best)
    assert shares == (1, 1, 1, 1) and result.tells_apart
    assert (result.kind, result.images, set(result.answers)) == ("few answers", images, {*COLOURS})


def test_random_answers_are_told_apart_by_chance_alone():
    result = probed(separable=False)
    for share in (result.nearest_neighbour, result.linear_pooled, result.linear_attended):
        assert share == pytest.approx(1 / 3, abs=0.15)
    assert not result.tells_apart and result.majority == pytest.approx(0.36, abs=0.05)


def test_many_answers_are_retrieved_from_the_nearest_training_image():
    names = [f"name {number}" for number in range(30)]
    chosen = choose_questions(asked(names * 2), asked(names, first=500), 0)
    found = TowerTokens({}, {})
    for sample in (*chosen.probed[0].train, *chosen.probed[0].eval):
        tokens = torch.eye(30)[names.index(sample.answer)].repeat(2, 1)
        found.mean[sample.images[0]], found.tokens[sample.images[0]] = tokens.mean(0), tokens.bfloat16()
    result = probe_question(chosen.probed[0], found)
    assert (result.kind, result.nearest_neighbour) == ("many answers", 1)
    assert result.linear_pooled is None and result.linear_attended is None
    assert result.majority == pytest.approx(1 / 30)


# --- which samples


def test_wordings_of_a_named_task_with_the_same_answers_are_one_question():
    texts = ("Which colour?", "Name the colour.")
    train = [one for i, text in enumerate(texts) for one in asked(colours(40, i), text, first=100 * i)]
    evaluation = asked(colours(20, 5), texts[1], first=900)
    (question,) = choose_questions(train, evaluation, 0).probed
    assert len(question.train) == 80 and len(question.wordings) == 2
    unnamed = [
        one for i, text in enumerate(texts) for one in asked(colours(40, i), text, "other", first=100 * i)
    ]
    (question,) = choose_questions(unnamed, asked(colours(20, 5), texts[1], "other", first=900), 0).probed
    assert len(question.train) == 40


def test_questions_that_disagree_about_the_same_images_stay_apart():
    dogs, cats = ["yes", "no"] * 20, ["no", "yes"] * 20
    train = asked(dogs, "Is there a dog?") + asked(cats, "Is there a cat?")
    evaluation = asked(dogs, "Is there a dog?", first=500) + asked(cats, "Is there a cat?", first=500)
    assert [len(question.wordings) for question in choose_questions(train, evaluation, 0).probed] == [1, 1]


@pytest.mark.parametrize(
    ("train", "evaluation", "reason"),
    [
        (asked(colours(40, 0), images=0), asked(colours(20, 1), images=0), "without an image"),
        (asked(colours(9, 0)), asked(colours(20, 1)), "of questions with fewer than 10 training samples"),
        (asked(colours(40, 0)), asked(colours(9, 1)), "of questions with fewer than 10 held-out samples"),
        (asked(["red"] * 40), asked(["red"] * 20), "of questions with one answer"),
        (asked(colours(40, 0)), asked(["mauve"] * 20), "with answers that do not occur in training"),
        (asked(colours(40, 0)), asked(colours(20, 0), images=2), "of questions with fewer than 10 training"),
        (
            asked([f"a dog runs over field {number}" for number in range(40)]),
            asked([f"a cat sits on wall {number}" for number in range(20)]),
            "with free text that hardly repeats",
        ),
    ],
)
def test_samples_that_cannot_be_probed_are_counted_with_the_reason(train, evaluation, reason):
    chosen = choose_questions(train, evaluation, 0)
    ((left_out, count),) = chosen.left_out.items()
    assert not chosen.probed and left_out.startswith(reason) and count == len(evaluation)


def test_questions_answered_by_boxes_are_named_as_such():
    train, evaluation = (
        [
            replace(one, boxes=(Box((0, 0, 9, number)),))
            for number, one in enumerate(asked(["<box>"] * count), 1)
        ]
        for count in (40, 20)
    )
    chosen = choose_questions(train, evaluation, 0)
    assert chosen.left_out == {"of questions answered by boxes": 20}
    presence = choose_questions(train + asked(["no"] * 40, first=500), evaluation + asked(["no"] * 20), 0)
    assert set(presence.probed[0].answers) == {"<box>", "no"}


def test_samples_left_out_of_a_question_are_counted_and_drawn_by_their_images(monkeypatch):
    monkeypatch.setattr(probe_questions, "MAX_TRAIN_SAMPLES", 30)
    train = asked(colours(60, 0)) + asked(colours(60, 2), "Which hue?", "hue")
    evaluation = asked([*colours(20, 1), "mauve"], first=500) + asked(
        colours(20, 1), "Which hue?", "hue", first=500
    )
    questions = choose_questions(train, evaluation, 0).probed
    assert [question.left_out.total() for question in questions] == [31, 30]
    assert {one.images[0] for one in questions[0].train} == {one.images[0] for one in questions[1].train}
    assert len(media_of(questions)) == 30 + 20


# --- through the command line


RECIPE = """\
model:
  vision: {name: nano}
  language: {name: nano}
  perceiver: {num_latents: 3, depth: 1, heads: 2, dim_head: 8}
  cross_attention: {heads: 2, dim_head: 8}
data: {train: [{path: train.jsonl}], eval: [{path: eval.jsonl}]}
train: {output_dir: run, max_steps: 1, batch_size: 2, num_workers: 0}
eval: {max_new_tokens: 2, batch_size: 32, before: false}
"""


def row(answer: str, image: str, text: str = "<image>Which shade?") -> dict:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A recipe whose images are dark or light, as their answers say, in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for split, count in (("train", 24), ("eval", 20)):
        rows = []
        for number in range(count):
            shade = number % 2
            name = f"{split}{number}.png"
            Image.new("RGB", (32, 32), (20 + 180 * shade + number,) * 3).save(name)
            rows.append(row(("Dark.", "Light.")[shade], name))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_probe_is_written_shown_and_used_by_the_run_and_its_report(here, capsys, monkeypatch):
    assert cli.main(["check", "recipe.yaml", "--probe"]) == 0
    shown = capsys.readouterr().out
    record = json.loads((here / "runs/check_recipe/probe.json").read_text())
    assert set(record) == PROBE_KEYS and [set(one) for one in record["questions"]] == [QUESTION_KEYS]
    (result,) = record["questions"]
    assert result["best"] == 1 and result["answers"] == {"dark": 12, "light": 12}
    assert "the tower can tell 100.0 % of the held-out answers (majority share 50.0 %)" in shown
    page = (here / "runs/check_recipe/check.html").read_text()
    assert "What the vision tower can tell" in page and "Which shade?" in page

    recipe = load_recipe("./recipe.yaml")
    assert json.loads((here / "run/probe.json").read_text()) == record
    prepare_output_dir(recipe.train.output_dir)
    verdict = train(recipe)["eval"]["verdict"]
    assert "the tower can tell 100.0 %, the model uses " in verdict and "train longer" in verdict
    report = (here / "run/report.html").read_text()
    assert "What the vision tower can tell" in report and '<p class="status good"><b>Verdict' not in report
    assert RunFolder.read(here / "run").probe == load_probe(here / "run", recipe)

    prepare_output_dir(recipe.train.output_dir, overwrite=True)
    assert load_probe(here / "run", recipe) is not None, "a run that starts again keeps the probe"


def test_a_probe_of_another_tower_or_other_data_is_not_used(here):
    assert cli.main(["check", "recipe.yaml", "--probe"]) == 0
    assert load_probe(here / "run", load_recipe("./recipe.yaml")) is not None
    assert load_probe(here / "run", load_recipe("./recipe.yaml", ["train.learning_rate=0.1"])) is not None
    others = "model.vision.image_size=64", "data.train.0.limit=3", "data.eval_fraction=0.5", "data.tiles={}"
    for other in others:
        assert load_probe(here / "run", load_recipe("./recipe.yaml", [other])) is None
    (here / "stored.yaml").write_text(dump_recipe(load_recipe("./recipe.yaml")))
    assert load_probe(here / "run", load_recipe("./stored.yaml")) is not None


def test_a_probe_in_the_folder_of_another_run_is_found_beside_it(here):
    assert cli.main(["check", "recipe.yaml", "--probe"]) == 0
    other = load_recipe("./recipe.yaml", ["train.output_dir=other", "train.learning_rate=0.1"])
    assert find_probe(here / "other", other) == load_probe(here / "run", other) is not None
    assert "the tower can tell 100.0 %" in train(other)["eval"]["verdict"]
    assert "What the vision tower can tell" in (here / "other/report.html").read_text()
    assert find_probe(here / "other", load_recipe("./recipe.yaml", ["data.tiles={}"])) is None


def test_cached_tokens_are_used_and_give_the_same_figures(here, monkeypatch):
    cached = ["check", "recipe.yaml", "data.cache={folder: cache, dtype: fp32}", "--probe", "--json"]
    assert cli.main(["check", "recipe.yaml", "--probe"]) == 0
    plain = json.loads((here / "run/probe.json").read_text())
    assert cli.main(cached) == 0
    encode, encoded = FrozenTower.encode, []

    def counted(self, images):
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(FrozenTower, "encode", counted)
    assert cli.main(cached) == 0
    assert encoded == [1], "only the image that gives the tokens' shape is encoded"
    assert json.loads((here / "run/probe.json").read_text())["questions"] == plain["questions"]


def test_training_and_the_probe_share_their_cached_tokens(here, monkeypatch):
    options = ["data.cache={folder: cache}", "train.max_steps=12"]
    train(load_recipe("./recipe.yaml", [*options, "eval.shuffled_images=false"]))
    folders = {path.parent for path in (here / "cache").glob("*/key.json")}
    assert cli.main(["check", "recipe.yaml", "--probe", *options]) == 0
    assert {path.parent for path in (here / "cache").glob("*/key.json")} == folders


@pytest.mark.parametrize("options", [[], ["data.cache={folder: cache, dtype: fp32}"]], ids=["", "cache"])
def test_with_tiles_the_probe_sees_what_a_single_view_cuts_off(options, here):
    for name, shade in (("dark.png", 0), ("light.png", 255)):
        picture = Image.new("RGB", (128, 32), (90, 10, 10))  # the tower sees the middle 32 x 32
        picture.paste((shade,) * 3, (0, 0, 32, 32))
        picture.save(name)
    media = dict.fromkeys(("dark.png", "light.png"), "row")
    dark, light = read_tokens(load_recipe("./recipe.yaml", options), media, None).mean.values()
    assert torch.equal(dark, light)
    recipe = load_recipe("./recipe.yaml", [*options, "data.tiles={max: 4}"])
    dark, light = read_tokens(recipe, media, None).mean.values()
    assert not torch.allclose(dark, light, atol=0.1)
    tower = load_vision("nano")
    views = FlamingoImageProcessor(tower.preprocess, tiles=Tiling(4).to_dict()).views(Image.open("light.png"))
    expected = spatial_tokens(tower.visual, views.values).mean((0, 1))
    torch.testing.assert_close(light, expected, atol=1e-4, rtol=1e-4)


def test_free_text_is_refused_in_one_line_before_the_tower_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr("flamingo_ft.evaluation.tower_tokens.load_recipe_vision", None)
    for split in ("train", "eval"):
        rows = [row(f"a dog runs over {split} field {n}", f"{split}{n}.png") for n in range(20)]
        (here / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["check", "recipe.yaml", "--probe"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: --probe: got no question that can be probed (20 samples with free text")
    assert (here / "runs/check_recipe/check.html").is_file() and not (here / "run").exists()


def test_a_recipe_without_held_out_samples_is_refused_in_one_line(here, capsys):
    assert cli.main(["check", "recipe.yaml", "data.eval=[]", "--probe"]) == 2
    assert "(no held-out samples)" in capsys.readouterr().err


def test_a_folder_with_other_files_gets_no_probe(here, capsys):
    (here / "run").mkdir()
    (here / "run/notes.txt").write_text("mine")
    assert cli.main(["check", "recipe.yaml", "--probe"]) == 0
    assert "run holds other files" in capsys.readouterr().err and not (here / "run/probe.json").exists()


# --- sentences


def result(
    best: float, majority: float = 0.25, images: int = 1, text: str = "Which colour?", distinct: int = 2
) -> ProbeResult:
    answers = {"red": 10, "green": 10} if distinct == 2 else {str(price): 2 for price in range(distinct)}
    shares = {"majority": majority, "nearest_neighbour": best, "linear_pooled": best, "linear_attended": None}
    return ProbeResult(
        text,
        "colour",
        [text.casefold().rstrip("?")],
        "few answers",
        images,
        20,
        100,
        answers,
        **shares,
        left_out={},
    )


def probe(*results: ProbeResult, tiled: bool = False) -> Probe:
    return Probe("digest", "nano", 4, 12, 10, tiled, list(results), {}, 0.0, 0.0)


def answered(share: float):
    """A hundred questions, and answers to them that are right that often."""
    questions = asked(["red", "green"] * 50)
    right = round(share * 100)
    return questions, [question.answer for question in questions[:right]] + ["?"] * (100 - right)


def test_a_model_that_uses_less_than_the_tower_can_tell_is_told_to_learn_faster():
    sentence = compare_with_tower(probe(result(0.84)), *answered(0.61))
    assert sentence.startswith("the tower can tell 84.0 %, the model uses 61.0 %: train longer or raise ")
    assert "gates" in sentence
    assert compare_with_tower(probe(result(0.84)), *answered(0.82)) == (
        "the tower can tell 84.0 %, the model uses 82.0 %"
    )


def test_a_tower_near_the_majority_share_is_to_blame():
    for sentence in (
        compare_with_tower(probe(result(0.28)), *answered(0.25)),
        *tower_lines(probe(result(0.28))),
    ):
        assert sentence == (
            "the tower cannot tell these answers apart ('Which colour?' 28.0 %, majority share 25.0 %): "
            "choose another tower, a larger model.vision.image_size, or data.tiles"
        )


def test_a_probe_of_two_images_blames_no_tower():
    (line,) = tower_lines(probe(result(0.28, images=2)))
    assert line.startswith("no conclusion from questions about several images")
    assert compare_with_tower(probe(result(0.28, images=2)), *answered(0.25)) is None


def test_answers_that_hardly_repeat_blame_no_tower():
    prices = result(0.0, text="Which price?", distinct=9)
    (line,) = tower_lines(probe(prices))
    assert line == (
        "no conclusion from questions with fewer than 5 training samples per answer, too few for a probe: "
        "'Which price?'"
    )
    assert compare_with_tower(probe(prices), *answered(0.25)) is None
    assert next(tower_lines(probe(result(0.84, distinct=9)))).startswith("the tower can tell 84.0 %")


def test_a_share_names_how_many_of_the_probed_questions_it_is_of():
    some = probe(result(0.84), result(0.28, text="Which shade?"), result(0.2, images=2, text="Same?"))
    assert next(tower_lines(some)) == (
        "the tower can tell 84.0 % of the held-out answers to 1 of 3 questions (majority share 25.0 %)"
    )
    questions, predictions = answered(0.61)
    questions += asked(["red"] * 20, "Which shade?")
    sentence = compare_with_tower(some, questions, [*predictions, *["red"] * 20])
    assert sentence.startswith(
        "the tower can tell 84.0 % of the answers to 1 of 2 questions, the model uses 61.0 %: "
    )


def test_a_probe_of_tiles_blames_no_tower():
    (line,) = tower_lines(probe(result(0.28), tiled=True))
    assert line == (
        "no conclusion from questions about tiled images, whose views a probe averages: 'Which colour?'"
    )
    assert compare_with_tower(probe(result(0.28), tiled=True), *answered(0.25)) is None
    assert "the tower can tell 84.0 %" in next(tower_lines(probe(result(0.84), tiled=True)))


def test_other_questions_and_answers_new_to_training_do_not_count():
    questions, predictions = answered(1.0)
    questions += asked(["mauve"] * 50) + asked(["red"] * 50, "Another?")
    assert "the model uses 100.0 %" in compare_with_tower(
        probe(result(1.0)), questions, predictions + ["?"] * 100
    )
    assert compare_with_tower(probe(result(1.0, text="Which one?")), *answered(1.0)) is None


def test_the_verdict_ends_with_the_probe_s_remedy_instead_of_the_general_one(here):
    recipe = load_recipe("./recipe.yaml")
    questions, predictions = answered(0.3)
    metrics = {"eval": {"verdict": f"the model is not looking: why; {REMEDY}"}}
    add_to_verdict(metrics, recipe, Results(questions, {"after": predictions}), probe(result(0.84)))
    verdict = metrics["eval"]["verdict"]
    assert verdict.startswith(
        "the model is not looking: why; the tower can tell 84.0 %, the model uses 30.0 %"
    )
    assert REMEDY not in verdict
    unchanged = {"eval": {"verdict": "as it was"}}
    add_to_verdict(unchanged, recipe, Results(questions, {"after": predictions}), None)
    assert unchanged == {"eval": {"verdict": "as it was"}}


def test_a_run_that_starts_from_a_bridge_keeps_its_tower(here):
    (here / "start").mkdir()
    questions, predictions = answered(0.3)
    metrics = {"eval": {"verdict": "why"}}
    started = load_recipe("./recipe.yaml", ["model.init_from=start"])
    add_to_verdict(metrics, started, Results(questions, {"after": predictions}), probe(result(0.28)))
    assert "cannot tell these answers apart" in metrics["eval"]["verdict"]
    assert metrics["eval"]["verdict"].endswith(
        "set data.tiles, or train without model.init_from and with another tower or model.vision.image_size"
    )
