"""Mixed preference optimization (arXiv:2411.10442): DPO with several losses at once."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from flamingo_ft.errors import UserError
from tests import regimes

from . import methods

DPO = (
    "train.method=dpo",
    "data.train=[{path: pairs.jsonl}]",
    "model.init_from=start",
    "data.template=flamingo",
)
MPO = "{loss_type: [sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1.0], beta: 0.3}"


@pytest.fixture
def pairs(small_run):
    methods.write("pairs.jsonl", methods.pair_rows())
    return small_run


@pytest.mark.filterwarnings("ignore")
def test_the_loss_equals_plain_trls_on_the_same_batch(pairs):
    overrides = (*DPO, f"train.dpo={MPO}")
    model, processor = regimes.build(*overrides)
    trainer = regimes.trainer(model, processor, *overrides)
    regimes.shake(model, 0.3)
    with torch.no_grad():
        ours = float(trainer.compute_loss(model, trainer.prepare_inputs(next(iter(trainer.batches)))))
    config = DPOConfig(
        "plain", beta=0.3, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0],
        per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none", max_length=None,
    )  # fmt: skip
    assert ours == pytest.approx(
        methods.reference_loss(DPOTrainer, config, methods.pair_rows(), *overrides), rel=1e-5
    )


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        (
            "{loss_type: [sigmoid, sft], loss_weights: [1.0]}",
            "train.dpo.loss_weights: got 1 weights for the 2 entries of loss_type; use one for each, or null",
        ),
        ("{loss_weights: [0.0]}", "train.dpo.loss_weights: got only zeros, which leave nothing to learn"),
        ("{loss_type: [sigmoid, kto]}", "train.dpo.loss_type.1: must be 'sigmoid', 'hinge', .* got 'kto'"),
        (
            "{loss_type: [hinge, sft], label_smoothing: 0.1}",
            "train.dpo.label_smoothing: only the sigmoid loss has label smoothing, got loss_type hinge, sft",
        ),
    ],
)
def test_losses_that_do_not_fit_together_are_refused_in_one_line(pairs, dpo, message):
    with pytest.raises(UserError, match=message):
        regimes.recipe(*DPO, f"train.dpo={dpo}")
