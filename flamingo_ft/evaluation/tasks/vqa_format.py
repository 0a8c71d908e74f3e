"""Questions and annotations in the format of VQA, which VQAv2 and OK-VQA share.

A file of questions is ``{"questions": [{"question_id", "image_id", "question"}, ...]}``, one of annotations
``{"annotations": [{"question_id", "answers": [{"answer"}, ...], "answer_type"}, ...]}`` with ten answers
each. Image 42 of val2014 is ``val2014/COCO_val2014_000000000042.jpg``.
Source: https://visualqa.org/vqa_v1_download.html
"""

from __future__ import annotations

from pathlib import Path

from .folder import DataFolder
from .rows import Row, rows_under
from .task import Example


def read_vqa(folder: DataFolder, questions: str, annotations: str, split: str) -> list[Example]:
    """Return the questions of a split of COCO's images, with all of their answers.

    questions, annotations: names of the files. Raises UserError for a question without an annotation.
    """
    question_file, annotation_file = folder.file(questions), folder.file(annotations)
    answers = {
        row.integer("question_id"): row for row in rows_under(annotation_file, "annotations", folder.source)
    }
    images, examples = None, []
    for row in rows_under(question_file, "questions", folder.source):
        annotation = answers.get(row.integer("question_id"))
        if annotation is None:
            raise row.error(f"{annotation_file.name} has no annotation of its question")
        name = f"COCO_{split}_{row.integer('image_id'):012}.jpg"
        images = images or folder.directory(split, containing=name)
        examples.append(_example(row, annotation, images / name))
    return examples


def _example(question: Row, annotation: Row, image: Path) -> Example:
    references = annotation.texts("answers", "answer")
    category = annotation.text("answer_type") if "answer_type" in annotation.value else ""
    return Example(question.where, (str(image),), question.text("question"), references, category=category)
