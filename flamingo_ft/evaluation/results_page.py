"""results.html: the answers of an evaluation on one page, wrong ones first, with images and filters."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image as Picture

from flamingo_ft import atomic
from flamingo_ft.adapters.card import TextTable
from flamingo_ft.data.drawing import ASKED, COLOURS, PREDICTED, REFERENCE, DrawnBox, draw_boxes
from flamingo_ft.data.media import open_medium
from flamingo_ft.data.sample import display_text
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import data_uri
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.templates import load_template
from flamingo_ft.version import __version__

from .metrics import ACCURACY, IOU, Metric, Prediction, normalize
from .question_boxes import drawn_on
from .questions import Question
from .reference_answers import classes_of
from .results import label_of_condition

RESULTS_PAGE = "results.html"
MAX_ROWS, MAX_IMAGES = 400, 8  # on the page, and the last images of each question
PIXELS = 168  # longer side of an image on the page
OTHER = "another answer"


@dataclass(frozen=True)
class PageRow:
    """A question as the page shows it. images: data URIs; others: answers under other conditions, and of
    other models."""

    where: str
    task: str
    images: list[str]
    question: str
    references: Sequence[str]
    answer: str
    metric: Metric
    score: float
    others: Mapping[str, str]


def write_results_page(
    path: Path,
    title: str,
    lines: Sequence[str],
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[Prediction]],
    metrics: Sequence[Metric],
    *,
    tables: Sequence[TextTable] = (),
    variants: Mapping[str, Sequence[Prediction]] | None = None,
) -> None:
    """Write the page of an evaluation.

    lines: what it found, in words. answers: by condition; the page is about those of the first. metrics: the
    first that scores single answers in 0..1 orders them, else accuracy; answers with boxes IoU. tables:
    scores, for the top.
    variants: answers of further models by their name.
    """
    main, *conditions = answers
    others = {label_of_condition(condition): answers[condition] for condition in conditions}
    others |= variants or {}
    scored_by, scores = _scores(questions, answers[main], metrics)
    order = sorted(range(len(questions)), key=lambda index: scores[index])[:MAX_ROWS]
    rows = []
    for index in order:
        question = questions[index]
        row = PageRow(
            question.where,
            question.task,
            _thumbnails(question, str(answers[main][index])),
            display_text(question.messages[-1]).replace(MEDIA_TOKEN, "").strip(),
            question.references,
            str(answers[main][index]),
            scored_by[index],
            float(scores[index]),
            {name: str(given[index]) for name, given in others.items()},
        )
        rows.append(row)
    texts = [str(answer) for answer in answers[main]]
    page = load_template("evaluation/results.html.jinja", trim_blocks=True, lstrip_blocks=True).render(
        title=title,
        version=__version__,
        lines=lines,
        tables=tables,
        score_label=scored_by[0].label if len({*scored_by}) == 1 else "score",
        rows=rows,
        total=len(questions),
        tasks=sorted({row.task for row in rows}),
        matrices=confusion_matrices(questions, texts),
        other=OTHER,
        box_colours=_box_colours(questions),
    )
    atomic.write_text(path, page)


def confusion_matrices(
    questions: Sequence[Question], answers: Sequence[str]
) -> dict[str, tuple[list[str], list[tuple[str, list[int]]]]]:
    """Return by task with few reference answers: the answers given, and for each reference how often each.

    The last of the answers given is `OTHER`.
    """
    matrices = {}
    for task in sorted({question.task for question in questions}):
        indices = [index for index, question in enumerate(questions) if question.task == task]
        classes = classes_of([questions[index] for index in indices])
        if classes is None:
            continue
        names = {normalize(name): name for name in classes}
        rows = []
        for name, members in classes.items():
            given = Counter(names.get(normalize(answers[indices[member]]), OTHER) for member in members)
            rows.append((name, [given[column] for column in (*classes, OTHER)]))
        matrices[task] = ([*classes, OTHER], rows)
    return matrices


def _box_colours(questions: Sequence[Question]) -> dict[str, str]:
    """Return the colour of each kind of box that may be on the page."""
    kinds = {ASKED: any(question.asked for question in questions)}
    kinds |= dict.fromkeys((REFERENCE, PREDICTED), any(question.boxes for question in questions))
    return {kind: colour for kind, colour in COLOURS.items() if kinds[kind]}


def _scores(
    questions: Sequence[Question], answers: Sequence[Prediction], metrics: Sequence[Metric]
) -> tuple[list[Metric], np.ndarray]:
    """Return the metric that orders each answer, and its score: IoU where the reference answer has boxes."""
    metric, scores = _scores_of_all(questions, answers, metrics)
    ious = IOU.measure(questions, answers)
    by_iou = np.array([bool(question.boxes) for question in questions]) & ~np.isnan(ious)
    return [IOU if with_boxes else metric for with_boxes in by_iou], np.where(by_iou, ious, scores)


def _scores_of_all(
    questions: Sequence[Question], answers: Sequence[Prediction], metrics: Sequence[Metric]
) -> tuple[Metric, np.ndarray]:
    for metric in metrics:
        statistics = metric.measure(questions, answers)
        is_score = metric.is_fraction and not metric.of_corpus and statistics.ndim == 1
        if is_score and not np.isnan(statistics).any():
            return metric, statistics
    return ACCURACY, ACCURACY.measure(questions, answers)


def _thumbnails(question: Question, answer: str) -> list[str]:
    """Return the last images of a question, with the boxes on them."""
    first = max(0, len(question.images) - MAX_IMAGES)
    return [
        _thumbnail(image, question.where, drawn_on(question, answer, number) if question.geometries else ())
        for number, image in enumerate(question.images[first:], first)
    ]


def _thumbnail(image: Any, where: str, boxes: Sequence[DrawnBox]) -> str:
    """Return a small JPEG as a data URI; empty if the image cannot be read any more."""
    try:
        picture = image if isinstance(image, Picture) else open_medium(image, where)[0]
    except UserError:
        return ""
    picture, size = picture.convert("RGB"), picture.size
    picture.thumbnail((PIXELS, PIXELS))
    picture = draw_boxes(picture, boxes, size) if boxes else picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return data_uri(buffer.getvalue(), "image/jpeg")
