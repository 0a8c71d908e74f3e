"""After a mediocre result, what a run measured decides what is advised; a good one needs no advice."""

from dataclasses import replace

import pytest

from flamingo_ft.data.sample import Box
from flamingo_ft.evaluation.advice import add_advice, held_out_trend, training_trend
from flamingo_ft.evaluation.image_use import REMEDY
from flamingo_ft.evaluation.probe import Probe, ProbeResult
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.evaluation.results import AFTER, BEFORE, Results
from tests.data.dialogues import IMAGE, user
from tests.regimes import recipe, write_run

QUESTIONS = [
    Question([user(IMAGE, "Odd?")], ["a.png"], f"row {number}", ("Yes.", "No.")[number % 2], "parity", number)
    for number in range(40)
]
LORA = "flamingo-ft train run/resolved_recipe.yaml model.init_from=run lora.language.r=16"
GRPO = "train.method=grpo", "train.grpo.num_generations=2"
FALLING, FLAT, RISING = ([1.0, 0.8, 0.6, 0.5], [1.0, 0.6, 0.5, 0.5], [1.0, 0.5, 0.6, 0.7])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_run(tmp_path)
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path)


def log(held_out=(), training=()):
    entries = [{"step": 10 * place, "eval_loss": loss} for place, loss in enumerate(held_out, start=1)]
    return entries + [{"step": place, "loss": loss} for place, loss in enumerate(training, start=1)]


def advised(
    entries,
    *settings,
    right=28,
    before=None,
    verdict="reads the images: ...",
    probe=None,
    questions=QUESTIONS,
):
    counts = {AFTER: right} | ({} if before is None else {BEFORE: before})
    answers = {
        condition: [
            question.answer if place < count else "Maybe." for place, question in enumerate(questions)
        ]
        for condition, count in counts.items()
    }
    metrics = {"eval": {"verdict": verdict}}
    add_advice(metrics, recipe("train.max_steps=40", *settings), Results(questions, answers), entries, probe)
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


def test_a_probe_is_advised_only_where_it_can_conclude(folder):
    def probe_lines(*settings, questions=QUESTIONS):
        return [line for line in advised([], *settings, questions=questions) if "--probe" in line]

    assert len(probe_lines()) == 1
    assert probe_lines("data.tiles={}") == []
    assert probe_lines(questions=[replace(one, images=["a.png", "b.png"]) for one in QUESTIONS]) == []
    assert probe_lines(questions=[replace(one, boxes=(Box((0, 0, 9, 9)),)) for one in QUESTIONS]) == []
    assert advised([], "data.tiles={}") == [
        "the loss does not show what limits the answers: more or more varied training rows, or "
        "data.augmentation"
    ]


def test_nothing_is_advised_that_is_in_effect(folder):
    assert not any("data.tiles" in line for line in advised([], "data.tiles={}", probe=probe_that_tells(0.7)))
    augmented = advised(log(RISING), "data.augmentation={}")
    assert "data.augmentation" in advised(log(RISING))[0] and "data.augmentation" not in augmented[0]


def test_another_tower_is_not_advised_to_a_run_that_starts_from_a_bridge(folder):
    remedy = (
        "set data.tiles, or train without model.init_from and with another tower or model.vision.image_size"
    )
    for probe in (None, probe_that_tells(0.7)):
        assert advised([], "model.init_from=start", probe=probe)[-1].endswith(remedy)


def test_other_methods_than_sft_are_advised_to_start_from_a_better_model(folder):
    dpo = "train.method=dpo", "lora.lora_dropout=0"
    assert advised([], *dpo)[0] == (
        "DPO changes how often a model gives answers that it knows: train a bridge by train.method=sft "
        "first, and start from it with model.init_from"
    )
    assert advised([], *dpo, "model.init_from=start", before=10)[0] == (
        "DPO changes how often a model gives answers that it knows, and 25.0 % were right before it: improve "
        "the run of model.init_from first, by train.method=sft"
    )
    assert advised(log(FALLING), *dpo)[0].startswith("the held-out loss was still falling")
    assert not any("LoRA on it" in line for line in advised(log(FLAT), *dpo))
    assert advised([], *dpo, right=36) == []


def test_sampled_answers_are_judged_by_their_reward(folder):
    rewards = [{"step": step, "loss": 1 - 0.01 * step, "reward": 0.01 * step} for step in range(1, 41)]
    first, second, *_ = advised(rewards, *GRPO)
    assert first.startswith(
        "the reward was still rising, from 0.255 to 0.355 in the last quarter of the steps: train"
    )
    assert second.startswith("GRPO changes how often")
    flat = [{**entry, "reward": 0.5} for entry in rewards]
    assert not any("rising" in line or "falling" in line for line in advised(flat, *GRPO))


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
