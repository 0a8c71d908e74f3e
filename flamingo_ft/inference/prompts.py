"""A prompt: a dialogue or document up to where the model answers, with its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.data.schemas.build_sample import text_to_blocks
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural
from flamingo_ft.model.added_tokens import MEDIA_TOKEN


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to where the assistant answers, or a document to continue.

    messages: ``role`` and ``content``, typed blocks with one image block per image. images: paths, URLs,
    contents of image files, videos, or decoded images. where: origin of the prompt, named in errors.
    """

    messages: list[dict[str, Any]]
    images: Sequence[Any]
    where: str = "prompt"


def make_prompt(images: Any, prompt: str | None) -> Prompt:
    """Make a prompt of one user message from a text and its images; see `Predictor.__call__`.

    Without a text, the images begin a document, as captions are trained on. Raises UserError without either,
    and if images and markers do not match.
    """
    images = as_list(images)
    if prompt is None:
        if not images:
            raise UserError("prompt: got neither a text nor an image; give at least one of them")
        return Prompt([{"role": DOCUMENT, "content": [{"type": "image"}] * len(images)}], images)
    return Prompt([{"role": "user", "content": place_images(prompt, len(images))}], images)


def as_list(images: Any) -> list[Any]:
    """Return images given as None, one image, or several, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def place_images(prompt: str, images: int) -> list[dict[str, str]]:
    """Return the prompt as typed blocks; without ``<image>`` markers, the images come first.

    Raises UserError if their numbers do not match.
    """
    markers = prompt.count(MEDIA_TOKEN)
    if markers == 0:
        return [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    if markers != images:
        counts = f"{plural(markers, f'{MEDIA_TOKEN} marker')} and {plural(images, 'image')}"
        raise UserError(f"prompt: got {counts}; give one image for each marker")
    return text_to_blocks(prompt)
