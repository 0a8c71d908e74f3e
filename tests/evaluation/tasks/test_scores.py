"""The publishers' figures that are not means over examples."""

import random

import pytest

from flamingo_ft.evaluation.tasks import TASKS


def mme_score(rows):
    """A subset's score as published. rows: for each image, whether its two answers are right."""
    accuracy = sum(a + b for a, b in rows) / (2 * len(rows))
    accuracy_plus = sum(a and b for a, b in rows) / len(rows)
    return 100 * accuracy + 100 * accuracy_plus


def test_mme_scores_of_a_model_that_is_right_except_in_one_subset(published):
    task = TASKS["mme"]
    examples = task.eval_examples(task.open(published["mme"]))
    answers = [example.references[0] for example in examples]
    values = task.further_scores(examples, answers)
    assert (values["perception_score"], values["cognition_score"]) == (2000, 800)
    wrong = [example.category for example in examples].index("color")
    answers[wrong] = "other"
    values = task.further_scores(examples, answers)
    assert (values["color_score"], values["color_accuracy_plus"]) == (mme_score([(False, True)]), 0)
    assert (values["perception_score"], values["cognition_score"]) == (1850, 800)


def test_mme_score_of_a_subset_in_any_order_is_the_publishers(published):
    task, rng = TASKS["mme"], random.Random(0)
    make = type(task.eval_examples(task.open(published["mme"]))[0])
    right = [(rng.random() < 0.7, rng.random() < 0.7) for _ in range(30)]
    rows = [
        (
            make("", (), "", (label,), category="count", group=f"count/{image}"),
            label if is_right else "no way",
        )
        for image, pair in enumerate(right)
        for label, is_right in zip(("yes", "no"), pair, strict=True)
    ]
    rng.shuffle(rows)
    values = task.further_scores(*map(list, zip(*rows, strict=True)))
    assert values["count_score"] == pytest.approx(mme_score(right), abs=1e-12)
    assert "perception_score" not in values  # the other subsets have no answers


def test_pope_reports_how_often_yes_is_said(published):
    task = TASKS["pope"]
    examples = task.eval_examples(task.open(published["pope"]))
    assert task.further_scores(examples, ["yes"] * 6) == {"yes_ratio": 1}
    assert task.further_scores(examples, ["yes", "no", "no"] * 2) == {"yes_ratio": pytest.approx(1 / 3)}
