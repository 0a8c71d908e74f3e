"""Evaluation on pairs in preference training: loss and rewards, and that it does not change training."""

import json
from pathlib import Path

import pytest

from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.training.evaluation import EvalBatches, run_evaluation
from flamingo_ft.training.train import train
from tests import regimes

from .test_dpo import DPO, pairs  # noqa: F401  (a fixture)

WEIGHTS = "adapter_model.safetensors"
WITH_EVAL = (
    *DPO,
    "data.eval=[{path: eval.jsonl}]",
    "eval={steps: 2, before: false, shuffled_images: false}",
)


@pytest.fixture
def eval_pairs(pairs):  # noqa: F811
    """Three held-out pairs of different lengths."""
    answers = [
        ("Dark.", "Light."),
        ("Light, as you see.", "Dark."),
        ("Dark.", "Light, or so it seems to me."),
    ]
    rows = [
        {"prompt": "Which shade?", "chosen": chosen, "rejected": rejected, "images": [f"{number % 2}.png"]}
        for number, (chosen, rejected) in enumerate(answers)
    ]
    Path("eval.jsonl").write_text("\n".join(map(json.dumps, rows)))


def log(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
def test_eval_loss_is_the_mean_over_pairs_for_any_batch_size_and_world_size(eval_pairs):
    config = regimes.recipe(*WITH_EVAL, "eval.batch_size=1")
    model, processor = regimes.build_model(config)
    trainer = regimes.trainer(model, processor, *WITH_EVAL)
    samples = open_data(config.data, 0).eval_samples()
    regimes.shake(model)
    alone = [
        run_evaluation(trainer, EvalBatches([sample], model, processor, config), None)["eval_loss"]
        for sample in samples
    ]
    assert len({round(loss, 3) for loss in alone}) == 3
    for size in (1, 2, 8):
        of_size = regimes.recipe(*WITH_EVAL, f"eval.batch_size={size}")
        loss = run_evaluation(trainer, EvalBatches(samples, model, processor, of_size), None)["eval_loss"]
        assert loss == pytest.approx(sum(alone) / 3, rel=1e-5)
        shares = [
            list(EvalBatches(samples, model, processor, of_size, rank=rank, world_size=2))
            for rank in range(2)
        ]
        assert len(shares[0]) == len(shares[1]) and sum(count for share in shares for _, count in share) == 3


@pytest.mark.slow
def test_evaluations_do_not_change_training_bit_for_bit(eval_pairs):
    metrics = train(regimes.recipe(*WITH_EVAL, "train.output_dir=with"))
    train(regimes.recipe(*WITH_EVAL, "eval.steps=null", "train.output_dir=without"))
    assert Path("with", WEIGHTS).read_bytes() == Path("without", WEIGHTS).read_bytes()
    losses = [[entry["loss"] for entry in log(name) if "loss" in entry] for name in ("with", "without")]
    assert losses[0] == losses[1]
    evaluations = [entry for entry in log("with") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 3]
    assert evaluations[-1]["eval_accuracy"] == metrics["eval"]["accuracy"]
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= evaluations[-1].keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_without_eval_steps_ends_with_the_rewards_that_trl_logs_for_all_held_out_pairs(
    eval_pairs, method
):
    # An evaluation has the three pairs in one batch, the end of a run in two of different sizes.
    overrides = (*WITH_EVAL, f"train.method={method}", "train.max_steps=1", "eval.answers=false")
    train(regimes.recipe(*overrides, "train.output_dir=with"))
    metrics = train(regimes.recipe(*overrides, "eval.steps=null", "train.output_dir=without"))
    expected = next(entry for entry in reversed(log("with")) if "eval_loss" in entry)
    (entry,) = [entry for entry in log("without") if "eval_rewards/margins" in entry]
    measured = metrics["eval"]["pairs"]
    assert measured["samples"] == 3 and measured["reward_margin"] == entry["eval_rewards/margins"] != 0
    assert measured["reward_margin"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)
    assert measured["ranked_correctly"] == entry["eval_rewards/accuracies"]
    if method == "dpo":  # TRL's KTO compares no pairs
        assert measured["ranked_correctly"] == pytest.approx(expected["eval_rewards/accuracies"])
    share = f"{100 * measured['ranked_correctly']:.1f} %"
    assert f"held-out pairs ranked correctly</dt><dd>{share}" in Path("without/report.html").read_text()
    assert f"| 3 | {share} |" in Path("without/README.md").read_text()


def test_eval_samples_with_one_answer_are_refused_if_eval_steps_is_set(eval_pairs):
    single = "data.eval=[{path: train.jsonl}]"
    with pytest.raises(UserError, match="train.jsonl: row 0: got one answer, but eval.steps compares two"):
        train(regimes.recipe(*WITH_EVAL, single))
    assert not Path("run/log.jsonl").exists()
    metrics = train(
        regimes.recipe(
            *WITH_EVAL, single, "eval.steps=null", "train.max_steps=1", "train.output_dir=generated"
        )
    )
    assert 0 <= metrics["eval"]["accuracy"] <= 1 and "pairs" not in metrics["eval"]
