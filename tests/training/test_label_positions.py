"""Scoring only label positions gives what TRL's head gives when it scores all of them."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.model import FlamingoForConditionalGeneration

from ..regimes import LORA, build, shake, trainer
from .test_dpo import DPO, pairs  # noqa: F401  (a fixture)

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def first_batch(one_trainer) -> dict[str, torch.Tensor]:
    return next(iter(one_trainer.batches))


@pytest.fixture
def sft_trainer(small_run):
    model, processor = build(LORA)
    shake(model, 0.3)
    return trainer(model, processor, LORA)


@pytest.fixture
def scored(monkeypatch):
    """How many positions reach the output head, call by call."""
    from trl.trainer import utils

    counts, head = [], utils._ChunkedLogProbFunction

    class Watched:
        @staticmethod
        def apply(hidden, *rest):
            counts.append(len(hidden))
            return head.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Watched)
    return counts


def score_every_position(monkeypatch):
    """Leave the selection of label positions to TRL, which scores all of them on a CPU."""
    monkeypatch.setattr(FlamingoForConditionalGeneration, "__call__", torch.nn.Module.__call__)


def gradients_of(model) -> dict[str, torch.Tensor]:
    named = trainable_parameters(model).items()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def assert_gradients_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def loss_gradients_and_metrics(sft_trainer, inputs) -> tuple[float, dict, dict]:
    """Return loss, gradients and metrics of a batch."""
    sft_trainer.model.zero_grad()
    loss = sft_trainer.compute_loss(sft_trainer.model, dict(inputs), num_items_in_batch=torch.tensor(5))
    loss.backward()
    metrics = {name: values.pop() for name, values in sft_trainer._metrics["train"].items()}
    return loss.item(), gradients_of(sft_trainer.model), metrics


def test_loss_gradients_and_metrics_equal_trls(sft_trainer, monkeypatch):
    sft_trainer.model.train()
    batch = first_batch(sft_trainer)
    batch["labels"][0, -2:] = -100  # rows of unequal label counts
    loss, gradients, metrics = loss_gradients_and_metrics(sft_trainer, batch)
    sft_trainer._total_train_tokens = 0
    score_every_position(monkeypatch)
    whole, expected, logged = loss_gradients_and_metrics(sft_trainer, batch)
    assert loss == pytest.approx(whole, rel=1e-6) and metrics == pytest.approx(logged, rel=1e-5)
    assert_gradients_equal(gradients, expected)


def test_every_field_of_the_output_equals_trls(sft_trainer, monkeypatch):
    """What preference training and GRPO ask for, at another temperature too."""
    model, batch = sft_trainer.model, first_batch(sft_trainer)
    del model.forward  # the head that the trainer added
    add_fused_lm_head(model, temperature=0.7, outputs=FIELDS)
    batch["labels"][0, -2:] = -100
    results = []
    for _ in range(2):
        model.zero_grad()
        output = model(**batch, fused_lm_head=True, use_cache=False)
        (output.log_probs.mean() + 0.1 * output.entropy.square().mean()).backward()
        results.append((output, gradients_of(model)))
        score_every_position(monkeypatch)
    (found, gradients), (expected, whole) = results
    assert found.log_probs.shape == batch["labels"][:, 1:].shape
    assert torch.equal(found.label_mask, batch["labels"][:, 1:] != -100)
    for field in (*FIELDS, "loss", "label_mask"):
        torch.testing.assert_close(found[field], expected[field], rtol=1e-5, atol=1e-5)
    assert_gradients_equal(gradients, whole)


def test_only_positions_that_predict_a_label_reach_the_output_head(sft_trainer, scored):
    batch = first_batch(sft_trainer)
    sft_trainer.compute_loss(sft_trainer.model, dict(batch))
    assert scored == [int((batch["labels"][:, 1:] != -100).sum())]


@pytest.mark.filterwarnings("ignore")
def test_of_pairs_only_the_answers_reach_the_output_heads_of_policy_and_reference(pairs, scored):  # noqa: F811
    model, processor = build(*DPO)
    dpo_trainer = trainer(model, processor, *DPO)
    batch = first_batch(dpo_trainer)
    scored.clear()  # a trainer scores a short text when it is made
    dpo_trainer.compute_loss(dpo_trainer.model, dict(batch))
    answers = int(batch["completion_mask"][:, 1:].sum())
    assert scored == [answers, answers] and 0 < answers < batch["input_ids"][:, 1:].numel()


def test_a_batch_without_labels_gives_zero_loss_and_zero_gradients(sft_trainer):
    sft_trainer.model.train()
    batch = first_batch(sft_trainer)
    batch["labels"][:] = -100
    loss, gradients, _ = loss_gradients_and_metrics(sft_trainer, batch)
    assert loss == 0 and gradients
    assert all(not gradient.any() for gradient in gradients.values())
