"""One question to a model on disk. Model cards name this module; to ask often, use `Predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flamingo_ft.adapters.answering import MAX_NEW_TOKENS
from flamingo_ft.data.media import open_image

from .predictor import Predictor, make_prompt


def answer(
    adapter: str | Path, images: Sequence[str | Path], prompt: str, max_new_tokens: int = MAX_NEW_TOKENS
) -> str:
    """Load an adapter or a merged model and answer one prompt about image files; see `Predictor.__call__`."""
    question = make_prompt(list(images), prompt)
    for path in images:
        open_image(path)  # a bad path should fail before the model is loaded
    return Predictor.from_pretrained(adapter).answer([question], max_new_tokens=max_new_tokens)[0]
