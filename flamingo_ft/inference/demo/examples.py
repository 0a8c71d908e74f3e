"""Questions to try on the page: those of a run's own held-out samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flamingo_ft.config import PREDICTIONS_FILE
from flamingo_ft.data.media import PREVIEW_PREFIX, open_preview
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

EXAMPLES = 6


def examples_of(run: Path, scratch: Path) -> list[dict[str, Any]]:
    """Return up to `EXAMPLES` held-out questions of a run, one of each task first: ``text`` and ``files``.

    scratch: folder for images that have no file of their own: they become the previews that the run kept.
    Questions whose images are missing are left out, and those of dialogues that refer to images of earlier
    turns.
    """
    file = run / PREDICTIONS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if _can_be_asked(row)]
    first = sorted({row["task"]: number for number, row in reversed(list(enumerate(rows)))}.values())
    chosen = [*first, *(number for number in range(len(rows)) if number not in first)]
    return [_example(rows[number], scratch / str(number)) for number in chosen[:EXAMPLES]]


def _can_be_asked(row: dict[str, Any]) -> bool:
    images = row["images"]
    if row["question"].count(MEDIA_TOKEN) not in (0, len(images)):
        return False
    return all(image.startswith(PREVIEW_PREFIX) or Path(image).is_file() for image in images)


def _example(row: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Return a question; markers before all its text are left out, because images come first without them."""
    leading = MEDIA_TOKEN * len(row["images"])
    files = [_file(image, scratch / f"{index}.png") for index, image in enumerate(row["images"], start=1)]
    return {"text": row["question"].removeprefix(leading).strip(), "files": files}


def _file(image: str, place: Path) -> str:
    """Return the path of an image; a preview is written to ``place``."""
    if not image.startswith(PREVIEW_PREFIX):
        return image
    place.parent.mkdir(exist_ok=True)
    open_preview(image).save(place)
    return str(place)
