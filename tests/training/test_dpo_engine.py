"""What holds for every training holds for preferences too: accumulation, and numbers that are none."""

import json
from pathlib import Path

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.training.train import train
from tests import regimes

from .test_dpo import DPO, pairs  # noqa: F401  (a fixture)


@pytest.fixture
def four(pairs):  # noqa: F811
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
def test_one_step_of_four_pairs_equals_accumulated_ones(four):
    found = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        wanted = (*DPO, "train.max_steps=1", "train.dpo={beta: 0.5}", f"train.batch_size={size}")
        wanted += (f"train.gradient_accumulation_steps={accumulated}",)
        model, processor = regimes.build(*wanted)
        trainer = regimes.trainer(model, processor, *wanted)
        regimes.shake(model)
        trainer.train()
        entry = trainer.state.log_history[0]
        found.append([entry["loss"], entry["grad_norm"]])
    assert abs(found[0][0] - 0.6931) > 0.1 and found[0][1] > 1
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_no_number_names_the_pairs(pairs):  # noqa: F811
    wild = ("train.learning_rate=1e36", "train.max_grad_norm=1e30")
    with pytest.raises(
        UserError, match=r"loss is nan at step 2; trained on .*pairs.jsonl: row [01], .*pairs.jsonl: row"
    ):
        train(regimes.recipe(*DPO, *wild))
