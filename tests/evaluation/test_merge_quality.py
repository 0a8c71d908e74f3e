"""Loss and accuracy decide whether a merged model is worse than its adapter; distances of logits do not."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_ft.cli.metrics_table import merge_lines, merge_table
from flamingo_ft.evaluation.bootstrap import bootstrap_interval
from flamingo_ft.evaluation.merge_quality import (
    HELD_OUT,
    LOSS_MARGIN,
    MADE_UP,
    EvalSet,
    Measurement,
    compare,
    logit_difference,
)
from flamingo_ft.evaluation.metrics import MERGE_METRIC
from flamingo_ft.evaluation.questions import Question

SAMPLES = 16
ACCURACY_MARGIN = 0.1
OF_THE_RUN, MADE_UP_SET = EvalSet([], [], HELD_OUT), EvalSet([], [], MADE_UP)


def measured(loss: float = 1.0, right: int = 12, logits: float = 1.0, spread: float = 0.0) -> Measurement:
    """Samples of 4 tokens, with losses that differ by ``spread`` from one to the next."""
    losses = [4 * (loss + spread * (-1) ** number) for number in range(SAMPLES)]
    statistics = {MERGE_METRIC.name: (np.arange(SAMPLES) < right).astype(float)}
    return Measurement(losses, [4] * SAMPLES, statistics, torch.full((3, 5), logits))


def compared(adapter: Measurement, merged: Measurement, eval_set: EvalSet = OF_THE_RUN) -> dict[str, Any]:
    models = {"adapter": adapter, "merged": merged}
    return compare(models, eval_set, LOSS_MARGIN, ACCURACY_MARGIN)


def is_worse(adapter: Measurement, merged: Measurement, eval_set: EvalSet = OF_THE_RUN) -> bool:
    return compared(adapter, merged, eval_set)["worse"]


def test_a_loss_beyond_the_margin_is_worse_and_one_within_is_not():
    assert is_worse(measured(), measured(1.01 + LOSS_MARGIN))
    assert not is_worse(measured(), measured(0.99 + LOSS_MARGIN))


def test_accuracy_far_below_the_adapters_is_worse_at_an_equal_loss():
    assert is_worse(measured(right=16), measured(right=6))
    assert not is_worse(measured(right=6), measured(right=16))


def test_the_drop_of_a_mean_has_the_standard_error_of_the_paired_differences():
    record = compared(measured(right=12), measured(right=10))
    differences = torch.tensor([1.0] * 2 + [0.0] * 14)
    assert record["accuracy_drop"] == pytest.approx(2 / 16)
    assert record["accuracy_drop_standard_error"] == pytest.approx(float(differences.std()) / 4)


def test_the_table_of_a_merge_names_its_samples_and_questions_and_has_intervals_beside_accuracies():
    """Beside the interval of 16 questions, an answer more or less is no change."""
    eval_set = EvalSet([], [Question([], [])] * SAMPLES, HELD_OUT)
    models = {"adapter": measured(right=12), "merged": measured(right=11)}
    cost = compare(models, eval_set, LOSS_MARGIN, ACCURACY_MARGIN)
    report = {"cost": cost, "prompts_from": HELD_OUT}
    table = merge_table(report)
    assert table.title == "measured on held-out samples of the run"
    assert table.columns[1].header == "loss, 16 samples"
    assert table.columns[2].header == "accuracy, 16 questions (95 % interval)"
    expected = [bootstrap_interval((np.arange(SAMPLES) < right).astype(float)) for right in (12, 11)]
    assert list(table.columns[2].cells) == [
        f"{100 * own.value:.1f} % ({100 * own.low:.1f} to {100 * own.high:.1f})" for own in expected
    ]
    assert expected[0].low < expected[1].value
    assert all(column.no_wrap == (place == 0) for place, column in enumerate(table.columns))
    verified = {"tensors": 1, "worst": None, "matrices_with_lora": 0}
    report |= {"verified": verified, "token_agreement": 1.0, "relative": 0.0, "tokens": 3}
    assert (
        ", accuracy -6.25 points (standard error 6.3); rejected if, less two standard errors, the loss rises "
        "by more than 0.5 or accuracy falls by more than 10 points\n"
    ) in merge_lines(report)


def test_a_difference_that_may_be_chance_is_not_worse():
    assert not is_worse(measured(right=12), measured(right=10))  # 12 points, of a standard error of 8
    assert not is_worse(measured(), measured(1.1 + LOSS_MARGIN, spread=2.0))


def test_other_logits_with_the_same_loss_are_not_worse():
    adapter, merged = measured(), measured(logits=2.0)
    assert logit_difference(merged, adapter)["relative"] == 1.0
    assert not is_worse(adapter, merged)


@pytest.mark.parametrize("eval_set", [OF_THE_RUN, MADE_UP_SET], ids=["eval data", "made up"])
def test_a_non_finite_loss_is_worse(eval_set):
    for loss in (math.nan, math.inf):
        assert is_worse(measured(), measured(loss), eval_set)


def test_answers_that_differ_from_the_adapters_on_made_up_prompts_are_not_worse():
    assert not is_worse(measured(right=16), measured(1.0 + 2 * LOSS_MARGIN, right=0), MADE_UP_SET)
    assert is_worse(measured(right=16), measured(1.0 + 5 * LOSS_MARGIN, right=0), MADE_UP_SET)


def test_the_loss_is_a_mean_over_tokens_not_over_samples():
    assert Measurement([1.0, 9.0], [1, 9], {}, torch.zeros(1, 1)).loss == 1.0
