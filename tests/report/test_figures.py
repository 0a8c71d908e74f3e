"""The figures of a run: their content and colours, and that nothing overlaps."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from flamingo_ft.data import Sample
from flamingo_ft.data.media import preview
from flamingo_ft.errors import UserError
from flamingo_ft.report import answer_grid, loss_curve, sample_grid
from flamingo_ft.report.curves import GREEN, INK, RED, loss_figure
from flamingo_ft.report.sample_grid import spread
from flamingo_ft.report.stages import mark_stages
from tests.model.kinds_of_images import KINDS

LONG = "A question that goes on and on about all there is to see, WITH WORDS IN CAPITALS, to the end " * 3


@pytest.fixture
def paint(tmp_path):
    """A function that writes an image file of a given size and returns its path."""

    def make(width: int, height: int) -> str:
        path = tmp_path / f"{width}x{height}.png"
        Image.linear_gradient("L").resize((width, height)).save(path)
        return str(path)

    return make


@pytest.fixture
def run(tmp_path, paint):
    """A function that writes the predictions and log of a run and returns its folder."""

    def make(*predictions: dict, losses: tuple[float, ...] = (2.0, 1.0, 0.5)) -> str:
        scan = {"task": "digit", "images": [paint(8, 8)], "question": "Which digit?", "answer": "Two."}
        entries = [{"loss": loss, "step": 10 * step} for step, loss in enumerate(losses, start=1)]
        entries.append({"train_runtime": 1.0, "step": 30})
        for name, rows in (("predictions", [scan | one for one in predictions]), ("log", entries)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return make


def texts(figure) -> dict[str, str]:
    """Return the colour of every text in a figure, by the text on one line."""
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return {" ".join(text.get_text().split()): to_hex(text.get_color()) for text in drawn}


def boxes(figure) -> list:
    """Return the extents of the captions and images of all cells, after drawing."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    extents = []
    for axes in figure.axes:
        extents += [
            box.get_window_extent(renderer) for box in (axes.title, *axes.artists) if box.get_visible()
        ]
        extents.append(axes.get_window_extent(renderer))
    return extents


@pytest.mark.parametrize("name", ["RGBA", "16-bit PNG", "palette with tRNS", "sideways"])
def test_the_report_draws_what_the_model_saw(run, tmp_path, name):
    path = tmp_path / "image"
    path.write_bytes(KINDS[name].content)
    shown = [
        {"images": [image], "before": "x", "after": "x"}
        for image in (str(path), preview(KINDS[name].content))
    ]
    for axes in answer_grid(run(*shown)).axes:
        (drawn,) = axes.get_images()
        assert np.abs(np.asarray(drawn.get_array()).astype(int) - KINDS[name].expected).max() <= 1


def test_the_loss_curve_goes_through_every_logged_loss(run):
    (axes,) = loss_curve(run({})).axes
    assert list(axes.lines[0].get_xdata()) == [10, 20, 30]
    assert list(axes.lines[0].get_ydata()) == [2.0, 1.0, 0.5]
    assert axes.get_ylim()[0] == 0 < 2.0 < axes.get_ylim()[1]


def test_a_loss_logged_once_is_drawn_as_a_curve(run):
    (axes,) = loss_curve(run({}, losses=(3.0,))).axes
    assert list(axes.lines[0].get_ydata()) == [3.0]


def test_answers_are_green_if_correct_and_red_if_wrong(run):
    figure = answer_grid(run({"before": "Nine.", "after": "two"}, {"before": "Two.", "after": "Six."}))
    shown = texts(figure)
    assert len(figure.axes) == 2 and [axes.get_title() for axes in figure.axes] == ["Which digit?"] * 2
    assert shown["✗ before: Nine."] == shown["✗ after: Six."] == RED
    assert shown["✓ after: two"] == shown["✓ before: Two."] == GREEN


def test_a_wrong_final_answer_is_shown_with_the_reference(run):
    assert "right: Two." in texts(answer_grid(run({"after": "Six."})))
    assert "right: Two." not in texts(answer_grid(run({"before": "Six.", "after": "Two."})))


def test_a_run_not_evaluated_before_training_shows_the_answers_after(run):
    shown = texts(answer_grid(run({"after": "Two."})))
    assert "✓ after: Two." in shown and not any("before" in text for text in shown)


def test_an_empty_answer_is_shown_as_nothing(run):
    assert texts(answer_grid(run({"after": ""})))["✗ after: (nothing)"] == RED


def test_a_dollar_sign_is_not_parsed_as_a_formula(run):
    figure = answer_grid(run({"question": "Is it $5 or $10?", "after": "$x^2$"}))
    boxes(figure)
    assert {"Is it $5 or $10?", "✗ after: $x^2$"} <= set(texts(figure))
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())


def test_images_of_a_question_are_side_by_side_in_order_at_one_height(run, paint):
    images = [paint(8, 8), paint(600, 300)]
    (axes,) = answer_grid(run({"images": images, "question": "Is <image> as <image>?", "after": "No."})).axes
    first, second = (image.get_extent() for image in axes.images)
    assert first[1] < second[0] and first[2:] == second[2:]
    assert second[1] - second[0] == pytest.approx(2.0)
    assert axes.get_title() == "Is [1] as [2]?" and {"1", "2"} <= {text.get_text() for text in axes.texts}


def test_small_scans_are_enlarged_pixel_by_pixel_and_photographs_smoothly(run, paint):
    (axes,) = answer_grid(run({"images": [paint(8, 8), paint(600, 300)], "after": "No."})).axes
    assert [image.get_interpolation() for image in axes.images] == ["nearest", "antialiased"]


def test_a_question_without_an_image_is_shown(run):
    assert "✓ after: Two." in texts(answer_grid(run({"images": [], "after": "Two."})))


def test_every_task_has_its_turn():
    items = ["a1", "a2", "a3", "b1", "c1", "c2"]
    assert spread(items, 5, lambda item: item[0]) == ["a1", "b1", "c1", "a2", "c2"]
    assert spread(items[:1], 5, lambda item: item[0]) == ["a1"]


@pytest.mark.parametrize(
    "columns", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_long_captions_do_not_overlap_and_stay_inside(run, paint, columns):
    images = [[paint(8, 8)], [paint(600, 300)] * 2, [paint(300, 600)], [paint(8, 8)] * 5]
    predictions = [{"images": some, "question": LONG, "before": "W" * 200, "after": LONG} for some in images]
    figure = answer_grid(run(*predictions), columns=columns)
    drawn = boxes(figure)
    width, height = figure.bbox.size
    for box in drawn:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    for one, other in itertools.combinations(drawn, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))


def test_samples_show_their_whole_dialogue_and_number_their_images(paint):
    blocks = [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": ", then "}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [*blocks, {"type": "image"}, {"type": "text", "text": "."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two and six."}]},
        {"role": "user", "content": [{"type": "text", "text": "The same?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    (axes,) = sample_grid([Sample(messages, [paint(8, 8)] * 2, "dialogue", "row 0")]).axes
    assert axes.get_title() == "First [1], then [2]."
    assert {"Two and six.", "The same?", "No."} <= set(texts(axes)) and "Be short." not in texts(axes)


def test_both_answers_of_a_pair_and_the_label_of_an_answer_are_shown():
    def turn(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    pair = Sample(
        [turn("user", "Which digit?"), turn("assistant", "Two.")],
        [],
        "t",
        "row 0",
        [turn("assistant", "Six.")],
    )
    shown = texts(sample_grid([pair, replace(pair, rejected=None, label=False)]))
    assert shown == {"Which digit?": INK, "chosen: Two.": GREEN, "rejected: Six.": RED, "bad: Two.": RED}


def test_the_iou_of_a_wrong_answer_is_not_part_of_it(run):
    answer, boxes = "[0, 0, 100, 100]", {"reference": [{"image": 0, "box": [0, 0, 1, 1]}]}
    figure = answer_grid(
        run({"answer": answer, "boxes": boxes, "image_sizes": [[8, 8]], "after": "At the top."})
    )
    assert "✗ after (IoU 0.0 %): At the top." in texts(figure)


def test_figures_are_drawn_without_pyplot(run):
    import matplotlib.pyplot as plt

    answer_grid(run({"after": "Two."}))
    loss_curve(run({}))
    assert plt.get_fignums() == []


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    for draw in (loss_curve, answer_grid):
        with pytest.raises(
            UserError, match="not the folder of a finished run, .* not found; use a run's output_dir"
        ):
            draw(tmp_path)


def test_the_error_for_a_run_without_answers_or_losses_has_a_remedy(run):
    with pytest.raises(UserError, match="no answers; train with held-out samples in data.eval"):
        answer_grid(run())
    with pytest.raises(UserError, match="no loss; train with train.logging_steps below train.max_steps"):
        loss_curve(run(losses=()))


def test_each_stage_is_marked_where_it_begins_and_a_run_of_one_stage_is_not():
    entries = [{"loss": 1.0, "step": step} for step in range(1, 8)]
    figure = loss_figure(entries)
    (axes,) = figure.axes
    curves = len(axes.lines)
    mark_stages(figure, {"bridge": 0})
    assert len(axes.lines) == curves
    mark_stages(figure, {"bridge": 0, "lora": 3})
    assert [line.get_xdata()[0] for line in axes.lines[curves:]] == [0, 3]
    assert {"bridge", "lora"} <= {text.get_text() for text in axes.texts}
