"""After a mediocre result, what a run measured decides what is advised; a good one needs no advice."""

import pytest

from flamingo_ft.evaluation.advice import add_advice, held_out_trend, training_trend
from flamingo_ft.evaluation.image_use import REMEDY
from flamingo_ft.evaluation.probe import Probe, ProbeResult
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.evaluation.results import AFTER, Results
from tests.data.dialogues import IMAGE, user
from tests.regimes import recipe, write_run

QUESTIONS = [
    Question([user(IMAGE, "Odd?")], ["a.png"], f"row {number}", ("Yes.", "No.")[number % 2], "parity", number)
    for number in range(40)
]
LORA = "flamingo-ft train run/resolved_recipe.yaml model.init_from=run lora.language.r=16"
FALLING, FLAT, RISING = ([1.0, 0.8, 0.6, 0.5], [1.0, 0.6, 0.5, 0.5], [1.0, 0.5, 0.6, 0.7])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)


def log(held_out=(), training=()):
    entries = [{"step": 10 * place, "eval_loss": loss} for place, loss in enumerate(held_out, start=1)]
    return entries + [{"step": place, "loss": loss} for place, loss in enumerate(training, start=1)]


def advised(entries, *settings, right=28, verdict="reads the images: ...", probe=None):
    answers = [question.answer if place < right else "Maybe." for place, question in enumerate(QUESTIONS)]
    metrics = {"eval": {"verdict": verdict}}
    add_advice(
        metrics, recipe("train.max_steps=40", *settings), Results(QUESTIONS, {AFTER: answers}), entries, probe
    )
    return metrics["eval"].get("advice", [])


def probe_that_tells(share):
    result = ProbeResult(
        "Odd?",
        "parity",
        ["odd"],
        "few answers",
        1,
        100,
        40,
        {"yes": 50, "no": 50},
        0.5,
        share,
        share,
        share,
        {},
    )
    return Probe("digest", "nano", 4, 12, 10, False, [result], {}, 0.0, 0.0)


def test_a_good_result_needs_no_advice(folder):
    assert advised(log(FALLING), right=36) == [] != advised(log(FALLING), right=35)


def test_a_held_out_loss_that_still_falls_advises_more_steps(folder):
    line = (
        "the held-out loss was still falling, from 0.6 at step 30 to 0.5 at step 40: train longer, --resume"
    )
    assert advised(log(FALLING))[0].startswith(line)
    assert not any("train longer" in line for losses in (FLAT, RISING) for line in advised(log(losses)))


def test_a_held_out_loss_that_rose_advises_more_data(folder):
    line, *_ = advised(log(RISING))
    assert line.startswith(
        "the held-out loss was lowest at step 20 (0.5) and rose to 0.7: the model overfits"
    )
    assert "eval.keep=best" in line
    assert (
        "eval.keep"
        not in advised(log(RISING), "data.eval=[{path: train.jsonl}]", "eval.keep=best", "eval.steps=1")[0]
    )


def test_a_flat_loss_far_below_the_held_out_one_advises_more_data(folder):
    assert "0.1 in training, 0.5 on held-out samples: more or more" in advised(log(FLAT, [0.1] * 8))[0]
    assert not any("more or more" in line for line in advised(log(FLAT, [0.5] * 8)))


def test_a_flat_loss_advises_lora_where_the_language_model_is_frozen(folder):
    assert any(LORA in line for line in advised(log(FLAT)))
    assert not any("LoRA on it" in line for line in advised(log(FALLING)))
    assert not any("LoRA on it" in line for line in advised(log(FLAT), "lora.language.r=4"))


def test_the_tower_is_blamed_only_by_a_probe(folder):
    assert any("flamingo-ft check run/resolved_recipe.yaml --probe" in line for line in advised([]))
    assert advised([], probe=probe_that_tells(0.7)) == [
        "the model answers as well as a probe of its tower: choose another tower, a larger "
        "model.vision.image_size, or data.tiles"
    ]
    assert advised([], probe=probe_that_tells(0.99)) == []  # the verdict says what to do


def test_the_general_remedy_of_a_verdict_is_not_repeated(folder):
    verdict = f"the images are of no use to the model: ...; {REMEDY}"
    assert [line.split(":")[0][:35] for line in advised(log(FALLING), verdict=verdict)] == [
        "the held-out loss was still falling"[:35]
    ]


def test_a_fall_of_the_training_loss_within_its_noise_is_none():
    noisy = [1.0, 0.6] * 8
    assert training_trend(log(training=noisy)).course == "flat"
    assert training_trend(log(training=[1.0 - 0.05 * step for step in range(16)])).course == "falling"
    assert training_trend(log(training=[1.0])) is held_out_trend(log([1.0, 0.5])) is None
