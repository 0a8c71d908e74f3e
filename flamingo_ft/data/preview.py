"""A medium as a line of JSON can hold it, to be shown later: its path, or a small picture of what has none."""

from __future__ import annotations

import base64
import io

from PIL import Image as PillowImage

from flamingo_ft.formatting import data_uri
from flamingo_ft.model import images
from flamingo_ft.model.download import is_url

from .media import open_image, open_medium
from .sample import Medium

SIDE = 128  # pixels
DATA_URI = "data:image/png;base64,"


def preview(medium: Medium) -> str:
    """The path of a local image; else a data URI with a small PNG, of a video its first frame."""
    if isinstance(medium, str) and not is_url(medium):
        return medium
    picture = open_medium(medium)[0]
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def open_preview(text: str) -> PillowImage.Image:
    """The picture of a `preview`. UserError for a path that is no longer a readable image."""
    if text.startswith(DATA_URI):
        return images.open_image(base64.b64decode(text.removeprefix(DATA_URI)))
    return open_image(text)
