"""Held-out pairs during preference training: the loss over all of them, and that training does not notice."""

import json
from pathlib import Path

import pytest

from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.training.evaluator import EvalBatches, run_evaluation
from flamingo_ft.training.train import train
from tests import regimes

from .test_dpo import DPO, pairs  # noqa: F401  (a fixture)

WEIGHTS = "adapter_model.safetensors"
HELD_OUT = (
    *DPO,
    "data.eval=[{path: held_out.jsonl}]",
    "eval={steps: 2, before: false, shuffled_images: false}",
)


@pytest.fixture
def held_out(pairs):  # noqa: F811
    """Beside the pairs that are trained on three others, no two of one length."""
    answers = [
        ("Dark.", "Light."),
        ("Light, as you see.", "Dark."),
        ("Dark.", "Light, or so it seems to me."),
    ]
    rows = [
        {"prompt": "Which shade?", "chosen": chosen, "rejected": rejected, "images": [f"{number % 2}.png"]}
        for number, (chosen, rejected) in enumerate(answers)
    ]
    Path("held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))


def log(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name, "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_the_mean_over_the_pairs_whatever_the_batches_and_processes(held_out):
    wanted = regimes.recipe(*HELD_OUT, "eval.batch_size=1")
    model, processor = regimes.build_model(wanted)
    trainer = regimes.trainer(model, processor, *HELD_OUT)
    samples = open_data(wanted.data, 0).eval_samples()
    regimes.shake(model)
    alone = [
        run_evaluation(trainer, EvalBatches([sample], model, processor, wanted), None)["eval_loss"]
        for sample in samples
    ]
    assert len({round(loss, 3) for loss in alone}) == 3
    for size in (1, 2, 8):
        of_size = regimes.recipe(*HELD_OUT, f"eval.batch_size={size}")
        found = run_evaluation(trainer, EvalBatches(samples, model, processor, of_size), None)["eval_loss"]
        assert found == pytest.approx(sum(alone) / 3, rel=1e-5)
        shares = [
            list(EvalBatches(samples, model, processor, of_size, rank=rank, world_size=2))
            for rank in range(2)
        ]
        assert len(shares[0]) == len(shares[1]) and sum(count for share in shares for _, count in share) == 3


@pytest.mark.slow
def test_training_learns_the_same_bit_by_bit_with_and_without_evaluations(held_out):
    metrics = train(regimes.recipe(*HELD_OUT, "train.output_dir=with"))
    train(regimes.recipe(*HELD_OUT, "eval.steps=null", "train.output_dir=without"))
    assert Path("with", WEIGHTS).read_bytes() == Path("without", WEIGHTS).read_bytes()
    losses = [[entry["loss"] for entry in log(name) if "loss" in entry] for name in ("with", "without")]
    assert losses[0] == losses[1]
    judged = [entry for entry in log("with") if "eval_loss" in entry]
    assert [entry["step"] for entry in judged] == [2, 3]
    assert judged[-1]["eval_accuracy"] == metrics["eval"]["accuracy"]
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= judged[-1].keys()


def test_held_out_samples_with_one_answer_are_refused_before_training_where_their_loss_is_wanted(held_out):
    single = "data.eval=[{path: train.jsonl}]"
    with pytest.raises(UserError, match="train.jsonl: row 0: got one answer, but eval.steps compares two"):
        train(regimes.recipe(*HELD_OUT, single))
    assert not Path("run/log.jsonl").exists()
    metrics = train(
        regimes.recipe(*HELD_OUT, single, "eval.steps=null", "train.max_steps=1", "train.output_dir=asked")
    )
    assert 0 <= metrics["eval"]["accuracy"] <= 1
