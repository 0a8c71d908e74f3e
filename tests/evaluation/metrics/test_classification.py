"""F1, macro F1 and ROC AUC are scikit-learn's; rankings of labels are scored and checked."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score, top_k_accuracy_score

from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import ACCURACY, METRICS, Ranked
from flamingo_ft.evaluation.metrics.classification import f1_counts, in_top, roc_auc
from flamingo_ft.evaluation.questions import Question

ANSWERS = st.lists(
    st.tuples(st.sampled_from(["yes", "no", "maybe"]), st.sampled_from(["yes", "no"])), min_size=1
)


def one_each(answers):
    return [[answer] for answer in answers]


@settings(max_examples=50, deadline=None)
@given(ANSWERS)
def test_f1_is_that_of_the_answer_yes(pairs):
    given_answers, expected = zip(*pairs, strict=True)
    value = METRICS["f1"].value(f1_counts(given_answers, one_each(expected)))
    if "yes" in given_answers + expected:
        assert value == pytest.approx(
            f1_score([e == "yes" for e in expected], [g == "yes" for g in given_answers])
        )
    else:
        assert value is None


@settings(max_examples=50, deadline=None)
@given(ANSWERS)
def test_macro_f1_is_the_mean_over_the_reference_answers(pairs):
    given_answers, expected = zip(*pairs, strict=True)
    metric = METRICS["macro_f1"]
    value = metric.value(metric.statistics(given_answers, one_each(expected)))
    official = f1_score(expected, given_answers, labels=sorted({*expected}), average="macro", zero_division=0)
    assert value == pytest.approx(official)


def test_case_and_period_do_not_count_in_f1_and_true_is_positive():
    assert METRICS["f1"].value(f1_counts(["Yes.", " TRUE", "no"], one_each(["yes", "true", "No."]))) == 1.0


def test_an_answer_that_equals_another_reference_is_of_the_class_of_its_question():
    metric = METRICS["macro_f1"]
    assert metric.value(metric.statistics(["sofa", "chair"], [["couch", "sofa"], ["chair"]])) == 1.0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2).filter(
        lambda rows: len({positive for _, positive in rows}) == 2
    )
)
def test_roc_auc_is_scikit_learns_ties_included(rows):
    scores, positive = zip(*rows, strict=True)
    expected = roc_auc_score(positive, scores)
    assert roc_auc(np.array(rows, dtype=float)) == pytest.approx(expected)
    rankings = [Ranked({"no": 0.0, "yes": float(score)}) for score in scores]
    metric, answers = METRICS["roc_auc"], one_each("yes" if one else "no" for one in positive)
    assert metric.value(metric.statistics(rankings, answers)) == pytest.approx(expected)
    swapped = [Ranked({"yes": float(score), "no": 0.0}) for score in scores]
    assert metric.value(metric.statistics(swapped, answers)) == pytest.approx(expected)


def test_roc_auc_is_not_defined_with_one_label_among_the_references():
    assert math.isnan(roc_auc(np.array([[0.3, 1.0], [0.1, 1.0]])))


def test_roc_auc_of_three_labels_is_refused():
    ranked = Ranked({"a": 0.1, "b": 0.2, "c": 0.3})
    with pytest.raises(UserError, match="^roc_auc: needs scores of the same two labels, got 3; use top_5$"):
        METRICS["roc_auc"].statistics([ranked], [["a"]])


def test_top_k_is_scikit_learns():
    generator = np.random.default_rng(0)
    scores, truth = generator.normal(size=(50, 8)), generator.integers(8, size=50)
    rankings = [Ranked({f"label {i}": row[i] for i in range(8)}) for row in scores]
    for k in (1, 3, 5):
        own = np.mean([in_top(k)(ranked, [f"Label {i}."]) for ranked, i in zip(rankings, truth, strict=True)])
        assert own == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=range(8)))


def question(answer: str) -> Question:
    return Question([{"role": "user", "content": [{"type": "text", "text": "Q?"}]}], [], answer=answer)


def test_the_best_ranked_label_is_the_answer_that_other_metrics_score():
    rankings = [Ranked({"dog": -2.0, "cat": -1.0}), Ranked({"dog": -1.0, "cat": -1.0})]
    assert [str(ranked) for ranked in rankings] == ["cat", "dog"]
    assert ACCURACY.evaluate([question("cat"), question("cat")], rankings) == 0.5


@pytest.mark.parametrize("name", ["roc_auc", "top_5"])
def test_generated_answers_are_refused_where_labels_must_be_ranked(name):
    message = (
        f"{name}: needs a score for each label, got generated answers; "
        "use a metric of answers, such as accuracy or f1"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        METRICS[name].evaluate([question("yes")], ["yes"])
