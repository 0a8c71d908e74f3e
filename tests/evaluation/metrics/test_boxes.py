"""IoU equals torchvision's, does not change with the scale of an axis, and pairs boxes in order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou as torchvision_iou

from flamingo_ft.config import EvalSection
from flamingo_ft.data.sample import Box
from flamingo_ft.evaluation.metrics import IOU, IOU_50
from flamingo_ft.evaluation.metrics.boxes import box_iou
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.evaluation.select_metrics import select_metrics

side = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).filter(lambda ends: ends[0] != ends[1])
boxes = st.tuples(side, side).map(lambda ends: (*map(min, ends), *map(max, ends)))


def question(*references: str) -> Question:
    return Question([], [], answer=references[0], other_answers=references[1:])


def values(answers: list[str], references: list[str]) -> tuple[float | None, float | None]:
    questions = [question(reference) for reference in references]
    return IOU.evaluate(questions, answers), IOU_50.evaluate(questions, answers)


@settings(max_examples=100, deadline=None)
@given(boxes, boxes)
def test_iou_equals_that_of_torchvision(first, second):
    expected = torchvision_iou(torch.tensor([first]).double(), torch.tensor([second]).double()).item()
    iou, found = values([f"There: {list(first)}."], [str(list(second))])
    assert iou == pytest.approx(expected) and found == (expected >= 0.5)


@settings(max_examples=50, deadline=None)
@given(boxes, boxes, st.floats(0.1, 10), st.floats(0.1, 10))
def test_iou_does_not_change_with_the_scale_of_an_axis(first, second, across, down):
    scale = np.array([across, down, across, down])
    scaled = (tuple(np.array(box) * scale) for box in (first, second))
    assert box_iou(*scaled) == pytest.approx(box_iou(first, second))


A, B, HALF_OF_A = "[0, 0, 100, 100]", "[500, 500, 600, 600]", "[0, 0, 100, 50]"


@pytest.mark.parametrize("answer, reference, expected", [
    (f"a {A} b {B}", f"a {A} b {B}", (1, 1)),
    (f"{B} {A}", f"{A} {B}", (0, 0)),  # in order: a box belongs to the words before it
    (A, f"{A} {B}", (0.5, 0.5)),
    (f"{A} {B}", A, (0.5, 0.5)),
    (HALF_OF_A, A, (0.5, 1)),
    ("nothing there", A, (0, 0)),
    (f"[100, 0, 0, 100] {B}", f"{A} {B}", (0.5, 0.5)),  # what is no box keeps its place
])  # fmt: skip
def test_boxes_are_compared_in_order(answer, reference, expected):
    assert values([answer], [reference]) == pytest.approx(expected)


def test_answers_without_a_reference_box_do_not_count():
    assert values([A, "a dog"], [A, "a dog"]) == (1, 1)
    assert values(["a dog"], ["a dog"]) == (None, None)
    assert math.isnan(IOU.measure([question("a dog")], ["a dog"])[0])


def test_of_several_references_the_nearest_counts():
    assert IOU.evaluate([question(B, HALF_OF_A, "none")], [A]) == 0.5


def test_iou_is_measured_by_default_where_answers_have_boxes():
    plain = Question([], [], answer="[1, 2, 3, 4]")
    names = [metric.name for metric in select_metrics(EvalSection(), [plain])]
    assert "iou" not in names
    boxed = Question([], [], answer=A, boxes=(Box((0, 0, 1, 1)),))
    assert [metric.name for metric in select_metrics(EvalSection(), [boxed] * 3)] == [
        "accuracy",
        "iou",
        "iou_50",
    ]
