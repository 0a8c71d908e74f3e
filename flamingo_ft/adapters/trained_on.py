"""A summary of an adapter's training samples, to warn about prompts that are unlike all of them.

The record is ``trained_on`` in the adapter's configuration; adapters of earlier versions have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo_ft.data.sample import CHUNK, DOCUMENT, Sample, message_text
from flamingo_ft.formatting import plural
from flamingo_ft.hub.weight_files import CONFIG_FILE

QUESTIONS, DOCUMENTS, IMAGES_ALONE = "questions", "documents", "images alone"
"""Forms of samples: dialogues whose user writes something, captions and documents, dialogues without."""

Record = dict[str, Any]


def record_of_samples(samples: Iterable[Sample]) -> Record | None:
    """Return the number of ``samples``, the ``forms`` they have, and the least and most ``images`` of one.

    None without samples.
    """
    images, forms = [], set()
    for sample in samples:
        images.append(len(sample.images))
        forms.add(form_of(sample.messages))
    if not images:
        return None
    return {"samples": len(images), "forms": sorted(forms), "images": [min(images), max(images)]}


def joined_record(first: Record | None, second: Record | None) -> Record | None:
    """Return the record of a model that was trained on both; None if one of them is not known."""
    if first is None or second is None:
        return None
    (least, most), (other_least, other_most) = first["images"], second["images"]
    return {
        "samples": first["samples"] + second["samples"],
        "forms": sorted({*first["forms"], *second["forms"]}),
        "images": [min(least, other_least), max(most, other_most)],
    }


def form_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the form of a sample, or of a prompt."""
    if any(message["role"] == DOCUMENT for message in messages):
        return DOCUMENTS
    has_text = any(message_text(message).strip() for message in messages if message["role"] == "user")
    return QUESTIONS if has_text else IMAGES_ALONE


def read_record(folder: Path) -> Record | None:
    """Return the record of the adapter or merged model in ``folder``; None if it has none."""
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("trained_on") if path.is_file() else None


def generate_options(folder: Path) -> str:
    """Return options with which ``flamingo-ft generate`` asks the model in ``folder`` as it was trained.

    An image and a question, unless its record says otherwise.
    """
    record = read_record(folder)
    if record is None:
        return "--image FILE --prompt TEXT"
    parts = {"--image FILE": record["images"][1] > 0, "--prompt TEXT": QUESTIONS in record["forms"]}
    return " ".join(part for part, fits in parts.items() if fits) or "--prompt TEXT"


def never_trained(record: Record | None, messages: Sequence[Mapping[str, Any]], images: int) -> Iterator[str]:
    """Yield a message for each way in which a prompt is unlike all training samples.

    Nothing without a record, and nothing about few-shot prompts. images: number of images in the prompt.
    """
    if record is None or any(message["role"] == CHUNK for message in messages):
        return
    # A run looks at some of its samples, and a start's are counted too.
    counted, (least, most) = plural(record["samples"], "training sample") + " looked at", record["images"]
    if not images and least:
        yield f"got no image, but none of {counted} was without one; add an image"
    elif images > most:
        yield f"got {plural(images, 'image')}, but none of {counted} had more than {most}"
    form = form_of(messages)
    if form not in record["forms"]:
        if form == QUESTIONS:
            yield f"got a question, but none of {counted} had one; leave out the prompt"
        elif QUESTIONS in record["forms"]:
            yield f"got no question, but none of {counted} was without one; ask one"
