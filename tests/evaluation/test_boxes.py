"""Boxes of questions and answers: in predictions.jsonl, on results.html, in verdicts and grids of answers."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import pytest
from PIL import Image, ImageColor

from flamingo_ft.cli.metrics_table import evaluation_tables
from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import OpenedData
from flamingo_ft.data.drawing import ASKED, COLOURS, PREDICTED, REFERENCE, draw_boxes
from flamingo_ft.data.sample import Box, Sample
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation import evaluate
from flamingo_ft.evaluation.advice import share_right
from flamingo_ft.evaluation.image_use import image_use
from flamingo_ft.evaluation.metrics import ACCURACY, IOU, IOU_50
from flamingo_ft.evaluation.questions import Question, questions_of
from flamingo_ft.evaluation.reference_answers import is_free_text
from flamingo_ft.evaluation.results import (
    AFTER,
    BEFORE,
    SHUFFLED,
    Results,
    card_tables,
    load_predictions,
    score_tables,
)
from flamingo_ft.evaluation.results_page import write_results_page
from flamingo_ft.evaluation.variant_tables import variant_tables
from flamingo_ft.evaluation.variants import Variant, VariantAnswers, compare_variants
from flamingo_ft.model import FlamingoImageProcessor
from flamingo_ft.model.geometry import ImageGeometry
from flamingo_ft.report.sample_grid import answers_figure, sample_grid
from tests.data.dialogues import IMAGE, nano_processor, user

RIGHT, WRONG = "[100, 100, 300, 300]", "[600, 600, 900, 900]"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def question(picture: str, number: int = 0, answer: str = RIGHT) -> Question:
    geometry = ImageGeometry.of(200, 100).resize(32, 32)
    boxes, asked = (Box((20, 10, 60, 30)),), (Box((150, 50, 190, 90)),)
    message = user(IMAGE, "Not at [750, 500, 950, 900]; where?")
    return Question(
        [message], [picture], f"row {number}", answer, "where", number, (), boxes, asked, (geometry,)
    )


def pixels_of(picture: Image.Image, kind: str) -> set[tuple[int, int]]:
    """The tenths of the picture's width and height that have the colour of a kind of box."""
    colour, small = ImageColor.getrgb(COLOURS[kind]), picture.convert("RGB")
    size = small.width, small.height

    def near(pixel):
        return all(abs(ours - theirs) < 50 for ours, theirs in zip(pixel, colour, strict=True))

    return {
        (10 * x // size[0], 10 * y // size[1])
        for x in range(size[0])
        for y in range(size[1])
        if near(small.getpixel((x, y)))
    }


def test_predictions_have_the_boxes_in_pixels(picture, tmp_path):
    results = Results([question(picture)], {BEFORE: ["no"], AFTER: [f"{WRONG} {RIGHT}"]})
    results.save(tmp_path)
    (row,) = load_predictions(tmp_path)
    box = {"image": 0, "box": [20, 10, 60, 30]}
    assert row["image_sizes"] == [[200, 100]]
    assert row["boxes"] == {
        ASKED: [{"image": 0, "box": [150, 50, 190, 90]}],
        REFERENCE: [box],
        "before": [],
        "after": [{"image": 0, "box": [120, 60, 180, 90]}, box],
    }
    plain = replace(question(picture), boxes=(), asked=(), geometries=())
    Results([plain], {AFTER: [RIGHT]}).save(tmp_path)
    assert "boxes" not in load_predictions(tmp_path)[0]


def test_the_page_orders_by_iou_and_draws_each_kind_of_box_in_its_colour(picture, tmp_path):
    questions = [question(picture, number) for number in range(2)]
    write_results_page(tmp_path / "a.html", "A", [], questions, {AFTER: [RIGHT, WRONG]}, [ACCURACY, IOU])
    page = (tmp_path / "a.html").read_text()
    assert re.findall(r"row (\d)", page) == ["1", "0"] and "IoU" in page
    assert all(colour in page for colour in COLOURS.values())
    first = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)[1]
    drawn = Image.open(io.BytesIO(base64.b64decode(first)))
    assert (1, 1) in pixels_of(drawn, REFERENCE) and (6, 6) in pixels_of(drawn, PREDICTED)
    assert (7, 5) in pixels_of(drawn, ASKED)


def test_the_page_orders_each_answer_by_the_metric_of_its_question(picture, tmp_path):
    plain = replace(question(picture), boxes=(), asked=(), geometries=(), answer="Yes")
    first, third = (replace(plain, where=f"row {number}") for number in (0, 2))
    questions = [first, question(picture, 1), third, question(picture, 3)]
    near = "[100, 100, 300, 280]"
    answers = {AFTER: ["Yes", near, "No", WRONG]}
    write_results_page(tmp_path / "a.html", "A", [], questions, answers, [ACCURACY, IOU])
    page = (tmp_path / "a.html").read_text()
    assert re.findall(r"row (\d)", page) == ["2", "3", "1", "0"]
    assert re.findall(r"<dt>(accuracy|IoU)</dt><dd>([^<]+)", page) == [
        ("accuracy", "0.0 %"), ("IoU", "0.0 %"), ("IoU", "90.0 %"), ("accuracy", "100.0 %")]  # fmt: skip


@pytest.fixture
def several_tasks(picture):
    """Results of a task with boxes, one without, and one with both; of 30 answers with boxes 15 are right."""
    plain = replace(question(picture), boxes=(), asked=(), geometries=(), answer="Yes")
    questions = [question(picture, number) for number in range(20)]
    questions += [replace(plain, task="yes or no") for _ in range(20)]
    questions += [replace(question(picture, number), task="both") for number in range(10)]
    questions += [replace(plain, task="both") for _ in range(10)]
    questions = [replace(one, sample=number) for number, one in enumerate(questions)]
    near = "[100, 100, 300, 280]"  # and not the same text as the reference
    answers = [near, WRONG] * 10 + ["Yes"] * 12 + ["No"] * 8 + [near, WRONG] * 5 + ["Yes"] * 10
    return Results(questions, {AFTER: answers, SHUFFLED: ["No"] * len(answers)}, [ACCURACY, IOU, IOU_50])


def test_tables_of_boxes_count_and_total_the_questions_with_boxes_alone(several_tasks):
    accuracy, iou, iou_50 = score_tables(several_tasks.summary())
    assert {name: row.samples for name, row in iou_50.tasks.items()} == {"both": 10, "where": 20}
    assert (iou_50.overall.samples, iou_50.overall.values[1]) == (30, 0.5)
    assert iou.subject == iou_50.subject == "held-out samples: 30 questions with boxes"
    assert (accuracy.subject, accuracy.overall.samples) == ("held-out samples", 60)
    shown = [list(table.columns[0].cells) for table in evaluation_tables(several_tasks.summary())]
    assert shown == [
        ["both", "where", "yes or no", "all"],
        ["both", "where", "all"],
        ["both", "where", "all"],
    ]


def test_a_single_task_with_boxes_among_several_is_called_by_its_name(several_tasks):
    several_tasks.questions = [
        replace(one, task=one.task.replace("both", "other")) for one in several_tasks.questions
    ]
    questions = several_tasks.questions[20:]
    answers = {condition: given[20:] for condition, given in several_tasks.answers.items()}
    tables = score_tables(Results(questions, answers, several_tasks.metrics).summary())
    assert [(table.overall_name, table.shown_tasks == {}) for table in tables] == [
        ("all", False), ("other", True), ("other", True)]  # fmt: skip


def test_the_total_of_accuracy_is_the_share_in_the_verdict_and_counts_boxes_by_their_iou(several_tasks):
    summary = several_tasks.summary()
    shares = {task: record["accuracy"] for task, record in summary["per_task"].items()}
    assert shares == {"where": 0.5, "yes or no": 0.6, "both": 0.75}
    assert summary["accuracy"] == pytest.approx(share_right(several_tasks)) == pytest.approx(37 / 60)
    assert "61.7 % right" in summary["verdict"]
    (title, *_) = [table.title for table in evaluation_tables(summary)]
    assert title == "accuracy (with boxes: box accuracy at IoU 0.5) on held-out samples"
    (card, *_) = card_tables(summary)
    assert (card.hub_type, card.values["all"]) == ("accuracy", summary["accuracy"])
    assert card.description == "exact match of greedy answers; with boxes, box accuracy at IoU 0.5"


def test_variants_are_compared_on_the_questions_that_a_metric_is_defined_on(several_tasks):
    questions = [*several_tasks.questions, Question([user("Hello?")], [], "row", "Yes")]
    answers = VariantAnswers("run", {AFTER: [*several_tasks.answers[AFTER], "Yes"]}, 1.0)
    tables = variant_tables(compare_variants(questions, [answers], several_tasks.metrics))
    assert [table.title for table in tables] == [
        "Accuracy (with boxes: box accuracy at IoU 0.5), 60 questions with images",
        "Accuracy, 1 question without images",
        "IoU, 30 questions with boxes",
        "Box accuracy at IoU 0.5, 30 questions with boxes",
    ]


def test_scores_of_earlier_versions_leave_out_the_tasks_without_boxes(several_tasks):
    summary = several_tasks.summary()
    for record in (summary, *summary["per_task"].values()):
        for key in ("boxes", "iou_samples", "iou_50_samples"):
            record.pop(key, None)
    accuracy, iou, _ = score_tables(summary)
    assert list(iou.tasks) == ["both", "where"] and accuracy.label == "accuracy"


@pytest.mark.parametrize("size", [(40, 20), (400, 200)])
def test_boxes_are_drawn_at_their_place_on_pictures_of_any_size(size):
    drawn = draw_boxes(Image.new("RGB", size), [((100, 50, 300, 150), PREDICTED)], (1000, 500))
    assert pixels_of(drawn, PREDICTED) <= {(x, y) for x in (1, 2, 3) for y in (1, 2, 3)}
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= pixels_of(drawn, PREDICTED) and max(drawn.size) >= 160


def test_an_answer_with_boxes_is_right_by_their_iou(picture):
    questions = [question(picture), replace(question(picture, 1), boxes=(), answer="A dog")]
    assert ACCURACY.measure(questions, ["[100, 100, 300, 290]", "a dog"]).tolist() == [1, 1]
    assert ACCURACY.measure(questions, [WRONG, RIGHT]).tolist() == [0, 0]
    places = [f"[{100 * (n % 6)}, {100 * (n // 6)}, {100 * (n % 6) + 100}, 900]" for n in range(30)]
    many = [question(picture, n, place) for n, place in enumerate(places)]
    assert not is_free_text(many)
    verdict = image_use(many, places, [*places[1:], places[0]])
    assert verdict == "reads the images: 100.0 % right, against 0.0 % with another image"


def test_the_grid_of_answers_has_a_legend_of_its_boxes(picture, tmp_path):
    Results([question(picture)], {AFTER: [WRONG]}).save(tmp_path)
    figure = answers_figure(load_predictions(tmp_path))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "asked about box", "reference box", "predicted box"]  # fmt: skip
    (axes,) = figure.axes
    assert len(axes.patches) == 3
    left, bottom = axes.patches[1].get_xy()
    assert (left / 2, 1 - bottom) == pytest.approx((0.1, 0.3))  # the picture is two heights wide


def test_a_grid_of_samples_shows_their_boxes(picture):
    content = [user(IMAGE, "Where?"), {"role": "assistant", "content": [{"type": "box", "index": 0}]}]
    sample = Sample(content, [picture], "where", "row 0", boxes=(Box((20, 10, 60, 30)),))
    (axes,) = sample_grid([sample]).axes
    assert len(axes.patches) == 1


def sees(mode, tiles):
    fields = nano_processor().image_processor.open_clip_preprocess
    return FlamingoImageProcessor({**fields, "resize_mode": mode}, tiles=tiles)


@pytest.mark.parametrize("other, tiles, same", [
    ("squash", None, True), ("shortest", None, False), ("longest", None, False),
    ("shortest", {"max_tiles": 4}, True),
])  # fmt: skip
def test_only_variants_that_see_the_same_are_compared(other, tiles, same, picture, monkeypatch, tmp_path):
    messages = [user(IMAGE, "Where?"), {"role": "assistant", "content": [{"type": "box", "index": 0}]}]
    sample = Sample(messages, [picture], "where", "row 0", boxes=(Box((80, 10, 120, 30)),))
    entry = DataSource(path=tmp_path)
    opened = OpenedData(DataSection(train=(entry,)), [], [])
    folders = {tmp_path / "a": ("squash", None), tmp_path / "b": (other, tiles)}

    class Processors:
        @staticmethod
        def from_pretrained(folder):
            return type("P", (), {"image_processor": sees(*folders[folder])})

    monkeypatch.setattr(evaluate, "FlamingoProcessor", Processors)
    variants = [Variant(folder.name, folder) for folder in folders]
    if same:
        (one,) = evaluate._with_boxes_written([sample], opened, variants)
        assert questions_of([one])[0].answer == "[400, 100, 600, 300]"
        return
    with pytest.raises(UserError, match="^--compare: the variants see different parts of the images"):
        evaluate._with_boxes_written([sample], opened, variants)
