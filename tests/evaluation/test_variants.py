"""Variants of a model are asked the same questions, one after the other, and compared by paired scores."""

import json
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.card import COMPARISON_FILE, card_text
from flamingo_ft.adapters.load import load_trained
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.cli import main
from flamingo_ft.cli.models_table import print_variants
from flamingo_ft.data import read_samples
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.card import write_comparison
from flamingo_ft.evaluation.evaluate import evaluate_adapter
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.evaluation.metrics import METRICS
from flamingo_ft.evaluation.questions import Question, questions_of
from flamingo_ft.evaluation.results import load_predictions
from flamingo_ft.evaluation.variant_tables import variant_tables
from flamingo_ft.evaluation.variants import VariantAnswers, compare_variants, find_variants, parts_of
from flamingo_ft.inference.predictor import Predictor
from tests import regimes
from tests.data.dialogues import IMAGE, assistant, user

SHORT = ["eval.max_new_tokens=4", "eval.batch_size=2"]
PARTS = ["with_images", "text_only"]


@pytest.fixture
def models(small_run):
    """Change to a folder with an adapter, `start`, and samples with and without images."""
    rows = [
        {"messages": [user(IMAGE, "Which shade?"), assistant(answer)], "images": [f"{number}.png"]}
        for number, answer in enumerate(("Dark.", "Light."))
    ]
    rows[1:1] = [{"messages": [user("Hello."), assistant("Good day.")]}]
    (small_run / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return small_run


def compared(*variants: str, **options):
    return evaluate_adapter("start", "samples.jsonl", SHORT, compare=variants, **options)


def answers_of(model, processor) -> list[str]:
    """Return the answers of a model to the samples, as evaluation generates them."""
    questions = questions_of(read_samples("samples.jsonl"))
    return Predictor(model, processor).answer(questions, batch_size=2, max_new_tokens=4)


def test_each_variant_answers_as_the_model_that_it_names(models):
    regimes.write_start(models / "other", "train.seed=5", regimes.LORA)
    compared("base", "nf4", "other", out=Path("out"))
    rows = load_predictions(Path("out"))
    assert [row["answer"] for row in rows] == ["Dark.", "Good day.", "Light."]
    assert [row["after"] for row in rows] == answers_of(*load_trained("start"))
    others = [{"after": answer} for answer in answers_of(*load_trained("other"))]
    assert [row["variants"]["other"] for row in rows] == others
    quantized = load_trained("start", quantization=Quantization("nf4"))
    assert [row["variants"]["nf4"]["after"] for row in rows] == answers_of(*quantized)
    untrained = regimes.build()
    base = [row["variants"]["base"]["after"] for row in rows]
    assert base == answers_of(*untrained) != [row["after"] for row in rows]


def test_a_model_and_its_base_are_found_where_their_bridge_moved(models, capsys):
    regimes.write_start(models / "continued", "model.init_from=start", regimes.LORA)
    asked = ["continued", "--data", "samples.jsonl", "--compare", "base", "--compare", "nf4", *SHORT]
    assert main(["eval", *asked, "--out", "before"]) == 0
    shutil.move("start", "moved")
    capsys.readouterr()
    assert main(["eval", *asked]) == 2
    assert "put it beside the adapter, or say where it is now (--start PATH" in capsys.readouterr().err
    assert main(["eval", *asked, "--start", "moved", "--out", "after"]) == 0
    assert load_predictions(Path("after")) == load_predictions(Path("before"))


@pytest.mark.parametrize(
    "what", [["--image", "0.png"], ["--data", "samples.jsonl", "--out", "answers.jsonl"]], ids=["one", "file"]
)
def test_generate_finds_a_bridge_that_moved(models, what):
    regimes.write_start(models / "adapter", *regimes.REGIMES["LoRA only"])
    shutil.move("start", "moved")
    asked = ["generate", "adapter", "--prompt", "Which shade?", *what, "--max-new-tokens", "2"]
    assert main(asked) == 2
    assert main([*asked, "--start", "moved"]) == 0


@pytest.mark.slow  # merging and its checks load five models
def test_a_merged_model_answers_as_its_adapter(models):
    merge_adapter("start", "merged", dtype=torch.float32)
    compared("merged", out=Path("out"))
    assert all(row["variants"]["merged"]["after"] == row["after"] for row in load_predictions(Path("out")))


@torch.no_grad()
def test_the_base_answers_text_as_the_language_model_alone(models):
    model, processor = regimes.build()  # its gates are closed
    save_adapter(model, processor, "start")
    compared("base", out=Path("out"))
    row = load_predictions(Path("out"))[1]
    alone = load_language("nano")
    ids = processor.apply_chat_template(
        [user("Hello.")], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    output = alone.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    expected = alone.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert row["after"] == row["variants"]["base"]["after"] == expected != ""


def test_a_copy_of_the_model_differs_by_exactly_nothing(models):
    shutil.copytree("start", "copy")
    own, copy = compared("copy", controls=True, metrics=["rouge_l"])["variants"]
    assert [score["questions"] for score in copy["scores"]] == PARTS * 2
    for score in copy["scores"]:
        assert score["difference"] == {"value": 0, "low": 0, "high": 0}
    assert [dict(score, difference=None) for score in own["scores"]] == [
        dict(score, difference=None) for score in copy["scores"]
    ]


def test_all_variants_are_asked_the_same_questions_in_their_order(models, monkeypatch):
    answer, asked = Predictor.answer, []

    def recording(self, prompts, **options):
        if options["max_new_tokens"] > 1:
            asked.append(prompts)
        return answer(self, prompts, **options)

    monkeypatch.setattr(Predictor, "answer", recording)
    compared("base", controls=True)
    conditions = 3
    assert len(asked) == 2 * conditions
    assert asked[0] == questions_of(read_samples(models / "samples.jsonl"))
    assert asked[:conditions] == asked[conditions:]
    assert [question.images for question in asked[1]] == [asked[0][2].images, [], asked[0][0].images]


def test_one_model_at_a_time_is_in_memory(models, monkeypatch):
    load, loaded = Predictor.from_pretrained, []

    def recording(*arguments, **options):
        assert all(model() is None for model in loaded)
        predictor = load(*arguments, **options)
        loaded.append(weakref.ref(predictor.model))
        return predictor

    monkeypatch.setattr(Predictor, "from_pretrained", recording)
    compared("base")
    assert len(loaded) == 2


# --- scores ---


def made_up(answers: dict[str, list[str]], images=(), **conditions):
    """Return the records of models that gave ``answers`` to questions whose reference is always ``a b``."""
    count = len(next(iter(answers.values())))
    shown = [["x.png"] if index in images else [] for index in range(count)]
    questions = [Question([user("?")], own, f"row {index}", "a b", "t") for index, own in enumerate(shown)]
    variants = [
        VariantAnswers(name, {"after": given, **conditions.get(name, {})}, 8.0)
        for name, given in answers.items()
    ]
    return questions, variants


def test_scores_and_differences_are_those_of_numpy():
    generator = np.random.default_rng(1)
    right = generator.random((2, 50)) < [[0.8], [0.5]]
    answers = {name: ["A b." if one else "c" for one in row] for name, row in zip("fs", right, strict=True)}
    first, second = compare_variants(*made_up(answers), [METRICS["accuracy"]])
    draws = np.random.default_rng(0).integers(50, size=(1_000, 50))
    for record, row in ((first, right[0]), (second, right[1])):
        low, high = np.quantile(row[draws].mean(axis=1), [0.025, 0.975])
        (score,) = record["scores"]
        assert (score["value"], score["low"], score["high"]) == pytest.approx((row.mean(), low, high))
    differences = right[1].astype(float) - right[0]
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    difference = second["scores"][0]["difference"]
    assert tuple(difference.values()) == pytest.approx((differences.mean(), low, high))
    assert "difference" not in first["scores"][0]


@pytest.mark.parametrize("metric", ["accuracy", "cider_d", "bleu_1"])
def test_questions_without_images_are_scored_by_themselves(metric):
    answers = {"first": ["a b", "a", "b", "c b", "a b"], "second": ["a", "a b", "a b", "c", "b"]}
    images, text = [0, 2, 3], [1, 4]
    questions, variants = made_up(answers, images)
    assert parts_of(questions) == {"with_images": images, "text_only": text}
    for record in compare_variants(questions, variants, [METRICS[metric]]):
        for score, part in zip(record["scores"], (images, text), strict=True):
            expected = METRICS[metric].evaluate(
                [questions[index] for index in part], [answers[record["name"]][index] for index in part]
            )
            assert (score["samples"], score["value"]) == (len(part), pytest.approx(expected))


def test_questions_of_one_kind_are_one_part():
    questions, _ = made_up({"first": ["a", "b"]})
    assert parts_of(questions) == {"all": [0, 1]}


def test_what_is_not_defined_is_not_a_number_in_the_record():
    records = compare_variants(*made_up({"first": ["x"], "second": ["y"]}), [METRICS["f1"]])
    assert records[1]["scores"][0]["difference"] == {"value": None, "low": None, "high": None}
    (table,) = variant_tables(records)
    assert [row[1:3] for row in table.rows] == [["not defined", ""], ["not defined", "not defined"]]
    assert "NaN" not in json.dumps(records)


def test_a_model_that_looks_and_one_that_does_not_have_their_verdicts():
    right = ["a b" if index % 2 else "c d" for index in range(40)]
    shuffled = {
        "looks": {"shuffled_images": right[1:] + right[:1]},
        "blind": {"shuffled_images": ["a b"] * 40},
    }
    questions, variants = made_up({"looks": right, "blind": ["a b"] * 40}, range(40), **shuffled)
    questions = [
        Question(one.messages, one.images, one.where, answer, "t")
        for one, answer in zip(questions, right, strict=True)
    ]
    looks, blind = compare_variants(questions, variants, [METRICS["accuracy"]])
    assert looks["scores"][0]["controls"]["shuffled_images"]["value"] == 0
    assert looks["verdict"].startswith("reads the images: 100.0 % right")
    assert blind["verdict"].startswith("the model is not looking")


def test_a_table_has_a_row_for_each_variant_with_intervals():
    answers = {"runs/first": ["a b"] * 3 + ["c"], "base": ["c"] * 4}
    (table,) = variant_tables(compare_variants(*made_up(answers), [METRICS["accuracy"]]))
    assert table.title == "Accuracy, 4 questions"
    assert table.columns == ["model", "score", "difference", "samples/s"]
    first, base = table.rows
    assert first[0] == "runs/first" and re.fullmatch(r"75\.0 % \([\d.]+ to 100\.0\)", first[1])
    assert base[1] == "0.0 % (0.0 to 0.0)" and re.fullmatch(r"-75\.0 \(-100\.0 to -[\d.]+\)", base[2])
    assert first[2:] == ["", "8"]


def test_the_format_that_was_asked_for_is_in_the_table(models):
    answers = [
        VariantAnswers(variant.name, {"after": ["a"]}, 1.0, variant.quantization)
        for variant in find_variants("start", "nf4", ["base", "int8"])
    ]
    questions, _ = made_up({"start": ["a"]})
    (table,) = variant_tables(compare_variants(questions, answers, [METRICS["accuracy"]]))
    assert [row[0] for row in table.rows] == ["start in nf4", "base in nf4", "int8"]


# --- the command, its files and the card ---


def test_the_command_prints_and_writes_the_same_figures(models, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["eval", "start", "--data", "samples.jsonl", *SHORT, "--compare", "base", "--controls"]
    assert main([*command, "--out", "out", "--card"]) == 0
    printed = capsys.readouterr().out
    variants = json.loads(Path("out", "results.json").read_text())["variants"]
    assert [record["name"] for record in variants] == ["start", "base"]
    page, card = Path("out", "results.html").read_text(), Path("start", "README.md").read_text()
    for table in variant_tables(variants):
        for text in (printed, page, card):
            assert table.title in text
            assert all(cell in text for row in table.rows for cell in row[1:])
    assert card.count("| with another image |") == page.count("<th>with another image</th>") == 1
    assert page.index("Accuracy, 2 questions with images") < page.index("Answers, wrong ones first")


def test_a_comparison_replaces_the_last_one_on_the_same_questions_in_the_card(models):
    def write(evaluated_on: str, *names: str) -> None:
        records = compare_variants(*made_up({name: ["a b"] for name in names}), [METRICS["accuracy"]])
        write_comparison(Path("start"), evaluated_on, records)

    write("samples.jsonl", "start", "base")
    write("more.jsonl", "start")
    card = Path("start", "README.md").read_text()
    assert re.findall("## Scores on (.*)", card) == ["samples.jsonl", "more.jsonl"] and "| base |" in card
    write("samples.jsonl", str(models / "start"), str(models / "copy"), "somebody/digits")
    card = Path("start", "README.md").read_text()
    assert re.findall("## Scores on (.*)", card) == ["samples.jsonl", "more.jsonl"]
    assert "| copy |" in card and "| this model |" in card and "| base |" not in card
    assert "| somebody/digits |" in card
    assert str(models) not in card and str(models) not in Path("start", COMPARISON_FILE).read_text()
    assert card_text(Path("start")) == card


def test_new_weights_have_no_scores_of_earlier_ones_in_their_card(models):
    records = compare_variants(*made_up({"start": ["a b"]}), [METRICS["accuracy"]])
    write_comparison(Path("start"), "samples.jsonl", records)
    assert "## Scores on samples.jsonl" in Path("start", "README.md").read_text()
    save_adapter(*regimes.build(), "start")
    assert "## Scores on" not in Path("start", "README.md").read_text()
    assert not Path("start", COMPARISON_FILE).exists()


@pytest.mark.parametrize(("columns", "narrow"), [(80, True), (120, False)])
def test_in_a_narrow_terminal_intervals_are_below_their_values(columns, narrow, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    swapped = {"shuffled_images": ["c"] * 4, "blank_images": ["c"] * 4}
    answers = {"runs/first": ["a b"] * 3 + ["c"], "runs/second": ["c"] * 4}
    questions, variants = made_up(answers, range(4), **dict.fromkeys(answers, swapped))
    print_variants(compare_variants(questions, variants, [METRICS["accuracy"]]))
    lines = capsys.readouterr().out.partition("in parentheses")[0].splitlines()
    row = next(line for line in lines if "75.0 %" in line)
    assert ("to 100.0)" in row) == (not narrow) and "runs/first" in row
    assert any("(-100.0 to" in line for line in lines) and all(len(line) <= columns for line in lines)


def test_a_name_in_square_brackets_is_printed(capsys):
    print_variants(compare_variants(*made_up({"[red]": ["a b"]}), [METRICS["accuracy"]]))
    assert "[red]" in capsys.readouterr().out


# --- refusals ---


@pytest.fixture
def no_loading(monkeypatch):
    """Fail if a model is loaded: a mistake has to cost nothing."""
    monkeypatch.setattr(Predictor, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["nf8"], "--compare: no folder nf8; use base, none, int8, nf4, fp4, or another adapter"),
        (["strat"], "--compare: no folder strat; did you mean start?"),
        (["base", "base"], "--compare: base is there twice; name another variant, or remove it"),
        (["./other", "other"], "--compare: other is there twice"),
        (["./start"], "--compare: ./start is the evaluated model itself"),
        (["empty"], "empty: not an adapter, config.json and adapter_model.safetensors not found"),
        (["samples.jsonl"], "samples.jsonl: not an adapter"),
        (["language"], "language: holds a llama model"),
        ([""], "no folder ''"),
    ],
)
def test_a_variant_that_cannot_be_asked_is_refused_in_one_line(models, no_loading, capsys, variants, message):
    Path("empty").mkdir()
    shutil.copytree("start", "other")
    shutil.copytree("start", "language")
    Path("language", "config.json").write_text('{"model_type": "llama"}')
    options = [argument for name in variants for argument in ("--compare", name)]
    assert main(["eval", "start", "--data", "samples.jsonl", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_merged_model_has_no_base_and_keeps_its_format(models):
    Path("merged").mkdir()
    config = json.loads(Path("start", "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    Path("merged", "config.json").write_text(json.dumps(config))
    Path("merged", "model.safetensors").touch()
    with pytest.raises(UserError, match="--compare base: merged is a whole model and has no adapter"):
        find_variants("merged", compared=["base"])
    for model, quantization, variants in (("merged", None, ["int8"]), ("start", "int8", ["merged"])):
        with pytest.raises(UserError, match="merged: the model is stored quantized, which cannot be changed"):
            find_variants(model, quantization, variants)
    assert [variant.name for variant in find_variants("start", None, ["merged"])] == ["start", "merged"]


def test_a_card_on_the_hub_is_not_written(models, hub, no_loading):
    with pytest.raises(UserError, match="--card: somebody/digits is on the Hub; "):
        evaluate_adapter("somebody/digits", "samples.jsonl", card=True)
