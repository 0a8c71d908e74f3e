"""Scoring only label positions gives TRL's loss, gradients and metrics."""

import pytest
import torch
from trl import SFTTrainer

from flamingo_ft.adapters import trainable_parameters

from ..regimes import LORA, build, shake, trainer


def first_batch(sft_trainer) -> dict[str, torch.Tensor]:
    return next(iter(sft_trainer.batches))


@pytest.fixture
def sft_trainer(small_run):
    model, processor = build(LORA)
    shake(model, 0.3)
    return trainer(model, processor, LORA)


def loss_gradients_and_metrics(sft_trainer, compute, inputs) -> tuple[float, dict, dict]:
    """Return loss, gradients and metrics of a `compute_loss` on a batch."""
    sft_trainer.model.zero_grad()
    loss = compute(sft_trainer, sft_trainer.model, dict(inputs), num_items_in_batch=torch.tensor(5))
    loss.backward()
    gradients = {
        name: p.grad.clone()
        for name, p in trainable_parameters(sft_trainer.model).items()
        if p.grad is not None
    }
    metrics = {name: values.pop() for name, values in sft_trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


def test_loss_gradients_and_metrics_equal_trls(sft_trainer):
    sft_trainer.model.train()
    batch = first_batch(sft_trainer)
    batch["labels"][0, -2:] = -100  # rows of unequal label counts
    loss, gradients, metrics = loss_gradients_and_metrics(sft_trainer, type(sft_trainer).compute_loss, batch)
    sft_trainer._total_train_tokens = 0
    whole, expected, logged = loss_gradients_and_metrics(sft_trainer, SFTTrainer.compute_loss, batch)
    assert loss == pytest.approx(whole, rel=1e-6) and metrics == pytest.approx(logged, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-5)


def test_only_positions_that_predict_a_label_reach_the_output_head(sft_trainer, monkeypatch):
    from trl.trainer import utils

    scored, head = [], utils._ChunkedLogProbFunction

    class Watched:
        @staticmethod
        def apply(hidden, *rest):
            scored.append(len(hidden))
            return head.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Watched)
    batch = first_batch(sft_trainer)
    sft_trainer.compute_loss(sft_trainer.model, dict(batch))
    assert scored == [int((batch["labels"][:, 1:] != -100).sum())]


def test_a_batch_without_labels_gives_zero_loss_and_zero_gradients(sft_trainer):
    sft_trainer.model.train()
    batch = first_batch(sft_trainer)
    batch["labels"][:] = -100
    loss, gradients, _ = loss_gradients_and_metrics(sft_trainer, type(sft_trainer).compute_loss, batch)
    assert loss == 0 and gradients
    assert all(not gradient.any() for gradient in gradients.values())
