"""The boxes of an answer, drawn on the image that they are on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from flamingo_ft.data.drawing import PREDICTED, draw_boxes
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model.images import open_image

from .dialogue import Turn
from .serving import FOLDER_VARIABLE
from .switchable_model import Answer


def with_picture(predictor: Predictor, turns: Sequence[Turn], answer: Answer | None) -> Answer | None:
    """Return the answer to the last question, with a picture of its boxes if it has any.

    The boxes are on the first image of the last question that has images.
    """
    image = next((turn.images[0] for turn in reversed(turns) if turn.images), None)
    if answer is None or image is None or not (boxes := predictor.boxes_in(answer.text, image)):
        return answer
    picture = open_image(image)
    folder = os.environ.get(FOLDER_VARIABLE)  # removed with the page
    with tempfile.NamedTemporaryFile(prefix="boxes-", suffix=".png", dir=folder, delete=False) as file:
        draw_boxes(picture, [(box, PREDICTED) for box in boxes], picture.size).save(file, "PNG")
    return replace(answer, picture=file.name)
