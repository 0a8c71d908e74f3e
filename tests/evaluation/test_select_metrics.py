"""A run computes the metrics that its recipe names, or those that fit its reference answers."""

from __future__ import annotations

import pytest

from flamingo_ft.config import EvalSection
from flamingo_ft.data import Sample
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import questions_of
from flamingo_ft.evaluation.select_metrics import higher_is_better, select_metrics
from tests.data.dialogues import IMAGE, assistant, user

SHORT = questions_of([Sample([user("Which?"), assistant(answer)], [], "short", "row") for answer in "ab" * 5])
CAPTION = {"role": DOCUMENT, "content": [IMAGE, {"type": "text", "text": "A bird sits on a branch."}]}
CAPTIONS = questions_of([Sample([CAPTION], ["a.png"], "captions", "row")])


def names(questions, **keys):
    return [metric.name for metric in select_metrics(EvalSection(**keys), questions)]


def test_accuracy_is_the_default_and_free_text_of_any_task_adds_metrics_of_captions():
    assert names(SHORT) == ["accuracy"]
    assert names([*SHORT, *CAPTIONS]) == ["accuracy", "rouge_l", "cider_d"]


def test_a_list_replaces_the_default_and_keeps_its_order():
    assert names(CAPTIONS, metrics=["bleu_4", "anls", "bleu_4"]) == ["bleu_4", "anls"]


def test_the_metric_that_selects_is_computed_once_even_if_it_is_not_listed():
    assert names(SHORT, metric="anls") == ["accuracy", "anls"]
    assert names(SHORT, metric="anls", metrics=["anls", "f1"]) == ["anls", "f1"]
    assert names(SHORT, metric="loss", metrics=["f1"]) == ["f1"]


def test_a_metric_that_cannot_be_computed_is_refused_at_once():
    with pytest.raises(UserError, match="roc_auc: needs a score for each label"):
        names(SHORT, metrics=["accuracy", "roc_auc"])


def test_without_questions_nothing_is_computed():
    assert names([], metrics=["roc_auc"]) == []


def test_a_higher_loss_is_worse_and_every_other_metric_better():
    assert not higher_is_better("loss")
    assert higher_is_better("cider_d") and higher_is_better("mine.py:shouting")
