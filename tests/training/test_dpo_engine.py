"""Gradient accumulation and non-finite losses in preference training."""

import json
from pathlib import Path

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.training.train import train
from tests import regimes

from .test_dpo import DPO, pairs  # noqa: F401  (a fixture)


@pytest.fixture
def four_pairs(pairs):  # noqa: F811
    answers = ("Dark.", "Light, I say.")
    rows = [
        {
            "prompt": "Which shade" + "?" * n,
            "chosen": answers[n % 2],
            "rejected": answers[1 - n % 2],
            "images": [f"{n % 2}.png"],
        }
        for n in range(4)
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_batch_of_four_pairs_equals_accumulated_smaller_batches(four_pairs):
    results = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        overrides = (*DPO, "train.max_steps=1", "train.dpo={beta: 0.5}", f"train.batch_size={size}")
        overrides += (f"train.gradient_accumulation_steps={accumulated}",)
        model, processor = regimes.build(*overrides)
        trainer = regimes.trainer(model, processor, *overrides)
        regimes.shake(model)
        trainer.train()
        entry = trainer.state.log_history[0]
        results.append([entry["loss"], entry["grad_norm"]])
    assert abs(results[0][0] - 0.6931) > 0.1 and results[0][1] > 1
    assert results[1] == pytest.approx(results[0], rel=1e-5) and results[2] == pytest.approx(
        results[0], rel=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_a_non_finite_loss_names_the_pairs(pairs):  # noqa: F811
    wild = ("train.learning_rate=1e36", "train.max_grad_norm=1e30")
    with pytest.raises(
        UserError, match=r"loss is nan at step 2; trained on .*pairs.jsonl: row [01], .*pairs.jsonl: row"
    ):
        train(regimes.recipe(*DPO, *wild))
