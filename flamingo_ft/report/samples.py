"""Pictures of samples, and of questions with the answers to them.

Captions are plain text in them: a dollar sign in an answer stays a dollar sign.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker
from matplotlib.textpath import text_to_path
from PIL import Image

from flamingo_ft.data.media import open_medium, open_preview
from flamingo_ft.data.sample import Sample, display_text
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.accuracy import normalise
from flamingo_ft.evaluation.results import AFTER, BEFORE, PREDICTIONS_FILE, load_predictions
from flamingo_ft.formatting import one_line
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .look import BLUE, GREEN, INK, RED, check_run

CELL_INCHES, LINE_INCHES = 2.7, 0.165  # width of a cell of a grid, height of a line of its captions
PAD_INCHES = 0.1  # around a cell
FONT_POINTS, QUESTION_LINES, ANSWER_LINES = 9, 3, 2  # of captions, and where they are cut
WIDEST = 60  # characters of a caption's line
GAP = 0.1  # between two images of a cell, in heights of an image
SCAN_PIXELS = 128  # smaller images are enlarged pixel by pixel, larger ones smoothly

Item = TypeVar("Item")


def answer_grid(run: str | Path, rows: int = 3, columns: int = 4) -> Figure:
    """Held-out questions spread over all tasks: their images, and the answers before and after training.

    Right answers are green and ticked, wrong ones red and crossed. UserError where a run has no answers.
    """
    check_run(Path(run), PREDICTIONS_FILE)
    predictions = load_predictions(Path(run))
    if not predictions:
        raise UserError(f"{run}: {PREDICTIONS_FILE} has no answers; train with held-out samples in data.eval")
    return answers_figure(predictions, rows, columns)


def answers_figure(predictions: Sequence[dict[str, Any]], rows: int = 3, columns: int = 4) -> Figure:
    """The same, of the rows of a run's predictions; where it goes on, with the answers so far."""
    shown = spread(predictions, rows * columns, lambda prediction: prediction["task"])
    return _grid([_answered(prediction) for prediction in shown], columns)


def sample_grid(samples: Sequence[Sample], rows: int = 2, columns: int = 4) -> Figure:
    """Samples spread over all tasks: their images, what is asked, and in blue what is to be said."""
    shown = spread(samples, rows * columns, lambda sample: sample.task)
    return _grid([_unanswered(sample) for sample in shown], columns)


def spread(items: Sequence[Item], count: int, task_of: Callable[[Item], str]) -> list[Item]:
    """The first ``count`` items when every task has its turn; within a task in their order."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(task_of(item), []).append(item)
    rounds = itertools.zip_longest(*by_task.values())
    turns = (item for one_each in rounds for item in one_each if item is not None)
    return list(itertools.islice(turns, count))


@dataclass(frozen=True)
class _Cell:
    """Images side by side, a caption above them, and coloured lines below."""

    images: list[Image.Image]
    above: str
    below: list[tuple[str, str]]

    @property
    def width(self) -> float:
        """Of the images in a row, in heights of an image."""
        return sum(image.width / image.height for image in self.images) + GAP * (len(self.images) - 1)

    @property
    def lines(self) -> tuple[int, int]:
        """Of text above and below the images."""
        return _lines([self.above]), _lines(text for text, _ in self.below)


def _answered(prediction: dict[str, Any]) -> _Cell:
    """A question, the answers of each time, and what would have been right where the last one was not."""
    (question,) = _mark_images([prediction["question"]])
    times = [time for time in (BEFORE, AFTER) if time in prediction]
    below = [_judged(time, prediction) for time in times]
    if not times or not _is_right(prediction, times[-1]):
        below.append((_cut(f"right: {prediction['answer']}", ANSWER_LINES), INK))
    return _Cell(
        [open_preview(image) for image in prediction["images"]], _cut(question, QUESTION_LINES), below
    )


def _judged(time: str, prediction: dict[str, Any]) -> tuple[str, str]:
    """What was said at a time, and in which colour."""
    mark, colour = ("✓", GREEN) if _is_right(prediction, time) else ("✗", RED)
    return _cut(f"{mark} {time}: {prediction[time] or '(nothing)'}", ANSWER_LINES), colour


def _is_right(prediction: dict[str, Any], time: str) -> bool:
    return normalise(prediction[time]) == normalise(prediction["answer"])


def _unanswered(sample: Sample) -> _Cell:
    """A dialogue: its first words above the images, the rest below."""
    turns = [message for message in sample.messages if message["role"] != "system"]
    texts = _mark_images([display_text(message) for message in turns])
    looks = {"user": (QUESTION_LINES, INK), "assistant": (ANSWER_LINES, BLUE)}
    told = []
    for message, text in zip(turns, texts, strict=True):
        lines, colour = looks[message["role"]]
        told.append((_cut(text, lines), colour))
    return _Cell(
        [open_medium(medium, sample.where)[0] for medium in sample.images], above=told[0][0], below=told[1:]
    )


def _mark_images(texts: Sequence[str]) -> list[str]:
    """Texts in which each ``<image>`` is the number of that image, or nothing where there is but one."""
    several = sum(text.count(MEDIA_TOKEN) for text in texts) > 1
    numbers = itertools.count(1)

    def mark(found: re.Match) -> str:
        return f" {f'[{next(numbers)}]' if several else ''}{found[1]} "

    marked = [re.sub(rf"\s*{MEDIA_TOKEN}\s*([.,;:?!]?)", mark, text) for text in texts]
    return [one_line(text) for text in marked]


def _cut(text: str, lines: int) -> str:
    """Text in at most so many lines of about the same length, none wider than a cell."""
    text = text[: WIDEST * (lines + 1)]  # what is certainly cut off need not be measured
    fits = [width for width in range(5, WIDEST) if all(map(_fits, textwrap.wrap(text, width)))]
    needed = len(textwrap.wrap(text, fits[-1]))
    if needed > lines:
        return "\n".join(textwrap.wrap(text, fits[-1], max_lines=lines, placeholder=" …"))
    return "\n".join(next(found for width in fits if len(found := textwrap.wrap(text, width)) == needed))


def _fits(line: str) -> bool:
    font = FontProperties(size=FONT_POINTS)
    points, *_ = text_to_path.get_text_width_height_descent(line, font, ismath=False)
    return points <= 72 * (CELL_INCHES - 2 * PAD_INCHES)


def _lines(texts: Iterable[str]) -> int:
    return sum(text.count("\n") + 1 for text in texts)


def _grid(cells: Sequence[_Cell], columns: int) -> Figure:
    """Cells of one size, in which all images have the same height."""
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
    return figure


def _draw(axes: Axes, cell: _Cell, width: float) -> None:
    left = (width - cell.width) / 2
    for number, image in enumerate(cell.images, start=1):
        right = left + image.width / image.height
        how = "nearest" if image.height < SCAN_PIXELS else "antialiased"
        axes.imshow(image, extent=(left, right, 0, 1), interpolation=how)
        if len(cell.images) > 1:
            _number(axes, left, number)
        left = right + GAP
    axes.set(xlim=(0, width), ylim=(0, 1), aspect="equal")
    axes.set_title(cell.above, fontsize=FONT_POINTS, color=INK, parse_math=False)
    _write_below(axes, cell.below)


def _number(axes: Axes, left: float, number: int) -> None:
    """A small number in an image's corner, legible on any image."""
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
    axes.text(left + 0.04, 0.95, str(number), fontsize=7, color=INK, va="top", bbox=paper)


def _write_below(axes: Axes, lines: Iterable[tuple[str, str]]) -> None:
    words = {"fontsize": FONT_POINTS, "parse_math": False, "multialignment": "center"}
    texts = [TextArea(text, textprops={"color": colour, **words}) for text, colour in lines]
    packed = VPacker(children=texts, align="center", pad=0, sep=3)
    place = {"xycoords": "axes fraction", "boxcoords": "offset points", "box_alignment": (0.5, 1)}
    looks = {"frameon": False, "annotation_clip": False, "pad": 0}
    axes.add_artist(AnnotationBbox(packed, xy=(0.5, 0), xybox=(0, -5), **place, **looks))
