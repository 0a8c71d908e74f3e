"""Grids of samples, and of questions with the answers to them.

Captions are plain text in matplotlib's sense: a dollar sign in an answer stays a dollar sign.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from PIL import Image

from flamingo_ft.config import PREDICTIONS_FILE
from flamingo_ft.data.boxes import boxes_on
from flamingo_ft.data.drawing import ASKED, COLOURS, PREDICTED, REFERENCE, DrawnBox, scaled
from flamingo_ft.data.media import open_medium, open_preview
from flamingo_ft.data.sample import Sample, display_text
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import IOU, exact_match
from flamingo_ft.evaluation.metrics.boxes import CORRECT, answer_ious, mean_iou
from flamingo_ft.evaluation.results import AFTER, BEFORE, load_predictions
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.model.geometry import Corners

from .curves import BLUE, GREEN, INK, RED
from .run_folder import check_run

CELL_INCHES, LINE_INCHES = 2.7, 0.165  # width of a cell, height of a caption's line
PAD_INCHES = 0.1  # around a cell
FONT_POINTS, QUESTION_LINES, ANSWER_LINES = 9, 3, 2  # captions are cut to so many lines
MAX_LINE_CHARACTERS = 60
IMAGE_GAP = 0.1  # between two images of a cell, in image heights
BOX_POINTS = 1.6  # line width of a box
SMALL_IMAGE_PIXELS = 128  # smaller images are enlarged pixel by pixel, larger ones smoothly

Item = TypeVar("Item")
Line = tuple[str, str]  # text, colour


def answer_grid(run: str | Path, rows: int = 3, columns: int = 4) -> Figure:
    """Show held-out questions of all tasks: their images, and the answers before and after training.

    Correct answers are green and ticked, wrong ones red and crossed. Raises UserError for a run without
    answers.
    """
    check_run(Path(run), PREDICTIONS_FILE)
    predictions = load_predictions(Path(run))
    if not predictions:
        raise UserError(f"{run}: {PREDICTIONS_FILE} has no answers; train with held-out samples in data.eval")
    return answers_figure(predictions, rows, columns)


def answers_figure(predictions: Sequence[dict[str, Any]], rows: int = 3, columns: int = 4) -> Figure:
    """Draw `answer_grid` from predictions.jsonl; during training, with the answers so far."""
    shown = spread(predictions, rows * columns, lambda prediction: prediction["task"])
    return _grid([_prediction_cell(prediction) for prediction in shown], columns)


def sample_grid(samples: Sequence[Sample], rows: int = 2, columns: int = 4) -> Figure:
    """Show samples of all tasks: their images, the user's turns, and the assistant's in blue.

    Of preference pairs both answers are shown. They and labelled answers are green if good and red if bad.
    """
    shown = spread(samples, rows * columns, lambda sample: sample.task)
    return _grid([_sample_cell(sample) for sample in shown], columns)


def spread(items: Sequence[Item], count: int, task_of: Callable[[Item], str]) -> list[Item]:
    """Return ``count`` items, taking the next item of each task in turn."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(task_of(item), []).append(item)
    rounds = itertools.zip_longest(*by_task.values())
    in_turn = (item for one_round in rounds for item in one_round if item is not None)
    return list(itertools.islice(in_turn, count))


@dataclass(frozen=True)
class _Cell:
    """Images side by side, a caption above them, and colored lines below.

    boxes: of each image those drawn on it, in fractions of its width and height.
    """

    images: list[Image.Image]
    above: str
    below: list[Line]
    boxes: Sequence[Sequence[DrawnBox]] = ()

    @property
    def width(self) -> float:
        """Width of the row of images, in image heights."""
        return sum(image.width / image.height for image in self.images) + IMAGE_GAP * (len(self.images) - 1)

    @property
    def lines(self) -> tuple[int, int]:
        """Lines of text above and below the images."""
        return _count_lines([self.above]), _count_lines(text for text, _ in self.below)


def _prediction_cell(prediction: dict[str, Any]) -> _Cell:
    """Show a question, its answers, and the reference answer if the last one is wrong."""
    (question,) = _number_images([prediction["question"]])
    conditions = [condition for condition in (BEFORE, AFTER) if condition in prediction]
    below = [_answer_line(prediction, condition) for condition in conditions]
    if not conditions or not _is_correct(prediction, conditions[-1]):
        below.append((_cut(f"right: {prediction['answer']}", ANSWER_LINES), INK))
    images = [open_preview(image) for image in prediction["images"]]
    boxes = _prediction_boxes(prediction, conditions[-1] if conditions else None)
    return _Cell(images, _cut(question, QUESTION_LINES), below, boxes)


def _prediction_boxes(prediction: dict[str, Any], condition: str | None) -> list[list[DrawnBox]]:
    """Return the boxes on each image, in fractions of it: of the question, the reference and the answer."""
    sizes = prediction.get("image_sizes", ())
    kinds = {ASKED: ASKED, REFERENCE: REFERENCE, condition: PREDICTED}
    on_images: list[list[DrawnBox]] = [[] for _ in sizes]
    for name, placed in prediction.get("boxes", {}).items():
        for one in placed if name in kinds else ():
            on_images[one["image"]].append((scaled(one["box"], sizes[one["image"]], (1, 1)), kinds[name]))
    return on_images


def _answer_line(prediction: dict[str, Any], condition: str) -> Line:
    mark, colour = ("✓", GREEN) if _is_correct(prediction, condition) else ("✗", RED)
    iou = ""
    if _has_boxes(prediction):
        iou = f" (IoU {IOU.text(mean_iou(answer_ious(prediction[condition], prediction['answer'])))})"
    return _cut(f"{mark} {condition}{iou}: {prediction[condition] or '(nothing)'}", ANSWER_LINES), colour


def _has_boxes(prediction: dict[str, Any]) -> bool:
    """Whether the reference answer has boxes."""
    return bool(prediction.get("boxes", {}).get(REFERENCE))


def _is_correct(prediction: dict[str, Any], condition: str) -> bool:
    """Whether an answer equals a reference answer or, if that has boxes, whether all of them are found."""
    if _has_boxes(prediction):
        return min(answer_ious(prediction[condition], prediction["answer"])) >= CORRECT
    return exact_match(prediction[condition], prediction.get("references") or [prediction["answer"]])


def _sample_cell(sample: Sample) -> _Cell:
    """Show a dialogue: its first turn above the images, the others below."""
    turns = [message for message in sample.messages if message["role"] != "system"]
    texts = _number_images([display_text(message) for message in turns])
    styles = {"user": (QUESTION_LINES, INK), "assistant": (ANSWER_LINES, BLUE)}
    lines = []
    for message, text in zip(turns, texts, strict=True):
        max_lines, colour = styles[message["role"]]
        lines.append((_cut(text, max_lines), colour))
    lines[-1:] = _rated_answers(sample) or lines[-1:]
    images = [open_medium(medium, sample.where)[0] for medium in sample.images]
    return _Cell(images, lines[0][0], lines[1:], _sample_boxes(sample, images))


def _rated_answers(sample: Sample) -> list[Line]:
    """Return the last message and, of a preference pair, the rejected answer; empty for other samples."""
    answers = []
    if sample.rejected:
        answers = [("chosen", sample.messages[-1], GREEN), ("rejected", sample.rejected[-1], RED)]
    elif sample.label is not None:
        answers = [
            ("good", sample.messages[-1], GREEN) if sample.label else ("bad", sample.messages[-1], RED)
        ]
    return [
        (_cut(f"{rating}: {display_text(message).strip()}", ANSWER_LINES), colour)
        for rating, message, colour in answers
    ]


def _sample_boxes(sample: Sample, images: Sequence[Image.Image]) -> list[list[DrawnBox]]:
    """Return the boxes of a sample on each image, in fractions of it."""
    return [
        [(scaled(box.pixels(*image.size), image.size, (1, 1)), REFERENCE) for box in boxes_on(sample, number)]
        for number, image in enumerate(images)
    ]


def _number_images(texts: Sequence[str]) -> list[str]:
    """Replace each ``<image>`` by the image's number in brackets; remove it if there is only one image."""
    several = sum(text.count(MEDIA_TOKEN) for text in texts) > 1
    numbers = itertools.count(1)

    def number(match: re.Match) -> str:
        bracket = f"[{next(numbers)}]" if several else ""
        return f" {bracket}{match[1]} "

    numbered = [re.sub(rf"\s*{MEDIA_TOKEN}\s*([.,;:?!]?)", number, text) for text in texts]
    return [" ".join(text.split()) for text in numbered]


def _cut(text: str, max_lines: int) -> str:
    """Wrap text into at most ``max_lines`` lines of about the same length, none wider than a cell."""
    text = text[: MAX_LINE_CHARACTERS * (max_lines + 1)]  # the rest is certainly cut off
    widths = [width for width in range(5, MAX_LINE_CHARACTERS) if all(map(_fits, textwrap.wrap(text, width)))]
    needed = len(textwrap.wrap(text, widths[-1]))
    if needed > max_lines:
        return "\n".join(textwrap.wrap(text, widths[-1], max_lines=max_lines, placeholder=" …"))
    narrowest = next(width for width in widths if len(textwrap.wrap(text, width)) == needed)
    return "\n".join(textwrap.wrap(text, narrowest))


def _fits(line: str) -> bool:
    font = FontProperties(size=FONT_POINTS)
    points, *_ = text_to_path.get_text_width_height_descent(line, font, ismath=False)
    return points <= 72 * (CELL_INCHES - 2 * PAD_INCHES)


def _count_lines(texts: Iterable[str]) -> int:
    return sum(text.count("\n") + 1 for text in texts)


def _grid(cells: Sequence[_Cell], columns: int) -> Figure:
    """Draw cells of one size, in which all images have the same height."""
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width = max(1.0, *(cell.width for cell in cells))
    above, below = (max(lines) for lines in zip(*(cell.lines for cell in cells), strict=True))
    height = (CELL_INCHES - 2 * PAD_INCHES) / width + LINE_INCHES * (above + below + 1) + 2 * PAD_INCHES
    layout = ConstrainedLayoutEngine(w_pad=PAD_INCHES, h_pad=PAD_INCHES)
    figure = Figure(figsize=(CELL_INCHES * columns, height * rows), layout=layout, facecolor="white")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, cell in itertools.zip_longest(all_axes, cells):
        axes.set_axis_off()
        if cell is not None:
            _draw(axes, cell, width)
    _add_legend(figure, cells)
    return figure


def _add_legend(figure: Figure, cells: Sequence[_Cell]) -> None:
    """Name the colours of the boxes, if there are any."""
    drawn = {kind for cell in cells for boxes in cell.boxes for _, kind in boxes}
    frames = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=BOX_POINTS, label=f"{kind} box")
        for kind, colour in COLOURS.items()
        if kind in drawn
    ]
    if frames:
        figure.legend(
            handles=frames, loc="outside lower center", ncols=len(frames), fontsize=FONT_POINTS, frameon=False
        )


def _draw(axes: Axes, cell: _Cell, width: float) -> None:
    left = (width - cell.width) / 2
    for number, image in enumerate(cell.images, start=1):
        right = left + image.width / image.height
        interpolation = "nearest" if image.height < SMALL_IMAGE_PIXELS else "antialiased"
        axes.imshow(image, extent=(left, right, 0, 1), interpolation=interpolation)
        for corners, kind in cell.boxes[number - 1] if cell.boxes else ():
            _draw_box(axes, corners, kind, left, right)
        if len(cell.images) > 1:
            _draw_number(axes, left, number)
        left = right + IMAGE_GAP
    axes.set(xlim=(0, width), ylim=(0, 1), aspect="equal")
    axes.set_title(cell.above, fontsize=FONT_POINTS, color=INK, parse_math=False)
    _write_below(axes, cell.below)


def _draw_box(axes: Axes, corners: Corners, kind: str, left: float, right: float) -> None:
    """Draw a box on an image that stands from ``left`` to ``right`` and from 1 down to 0."""
    x1, y1, x2, y2 = corners
    place, width = (left + x1 * (right - left), 1 - y2), (x2 - x1) * (right - left)
    halo = [withStroke(linewidth=2 * BOX_POINTS, foreground="white")]
    frame = Rectangle(
        place, width, y2 - y1, fill=False, edgecolor=COLOURS[kind], linewidth=BOX_POINTS, path_effects=halo
    )
    axes.add_patch(frame)


def _draw_number(axes: Axes, left: float, number: int) -> None:
    """Draw a small number in an image's corner, legible on any image."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
    axes.text(left + 0.04, 0.95, str(number), fontsize=7, color=INK, va="top", bbox=box)


def _write_below(axes: Axes, lines: Iterable[Line]) -> None:
    font = {"fontsize": FONT_POINTS, "parse_math": False, "multialignment": "center"}
    texts: list[Artist] = [TextArea(text, textprops={"color": colour, **font}) for text, colour in lines]
    packed = VPacker(children=texts, align="center", pad=0, sep=3)
    position = {"xycoords": "axes fraction", "boxcoords": "offset points", "box_alignment": (0.5, 1)}
    frame = {"frameon": False, "annotation_clip": False, "pad": 0}
    axes.add_artist(AnnotationBbox(packed, xy=(0.5, 0), xybox=(0, -5), **position, **frame))
