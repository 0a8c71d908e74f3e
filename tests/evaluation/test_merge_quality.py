"""When a merged model counts as worse than its adapter: loss and accuracy decide, distances of logits do
not."""

import math

import pytest
import torch

from flamingo_ft.evaluation.merge_quality import (
    HELD_OUT,
    LOSS_MARGIN,
    MADE_UP,
    EvalSet,
    Measurement,
    compare,
    logit_difference,
)

SAMPLES = 16
ACCURACY_MARGIN = 0.1
OF_THE_RUN, NOT_HERE = EvalSet([], [], HELD_OUT), EvalSet([], [], MADE_UP)


def measured(loss: float = 1.0, right: int = 12, logits: float = 1.0, spread: float = 0.0) -> Measurement:
    """Samples of 4 tokens, with losses that differ by ``spread`` from one to the next."""
    losses = [4 * (loss + spread * (-1) ** number) for number in range(SAMPLES)]
    correct = [number < right for number in range(SAMPLES)]
    return Measurement(losses, [4] * SAMPLES, {"accuracy": correct}, torch.full((3, 5), logits))


def is_worse(adapter: Measurement, merged: Measurement, eval_set: EvalSet = OF_THE_RUN) -> bool:
    models = {"adapter": adapter, "merged": merged}
    return compare(models, eval_set, LOSS_MARGIN, ACCURACY_MARGIN)["worse"]


def test_a_loss_beyond_the_margin_is_worse_and_one_within_is_not():
    assert is_worse(measured(), measured(1.01 + LOSS_MARGIN))
    assert not is_worse(measured(), measured(0.99 + LOSS_MARGIN))


def test_accuracy_far_below_the_adapters_is_worse_at_an_equal_loss():
    assert is_worse(measured(right=16), measured(right=6))
    assert not is_worse(measured(right=6), measured(right=16))


def test_what_may_be_chance_is_not_worse():
    assert not is_worse(measured(right=12), measured(right=10))  # 12 points, of a standard error of 8
    assert not is_worse(measured(), measured(1.1 + LOSS_MARGIN, spread=2.0))


def test_other_logits_with_the_same_loss_are_not_worse():
    adapter, merged = measured(), measured(logits=2.0)
    assert logit_difference(merged, adapter)["relative"] == 1.0
    assert not is_worse(adapter, merged)


@pytest.mark.parametrize("eval_set", [OF_THE_RUN, NOT_HERE], ids=["held out", "made up"])
def test_a_non_finite_loss_is_worse(eval_set):
    for loss in (math.nan, math.inf):
        assert is_worse(measured(), measured(loss), eval_set)


def test_other_answers_than_the_adapters_to_made_up_prompts_are_not_worse():
    assert not is_worse(measured(right=16), measured(1.0 + 2 * LOSS_MARGIN, right=0), NOT_HERE)
    assert is_worse(measured(right=16), measured(1.0 + 5 * LOSS_MARGIN, right=0), NOT_HERE)


def test_the_loss_is_a_mean_over_tokens_not_over_samples():
    assert Measurement([1.0, 9.0], [1, 9], {}, torch.zeros(1, 1)).loss == 1.0
