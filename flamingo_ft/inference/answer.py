"""One question to a model on disk. Model cards name this module; to ask often, use `Predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo_ft.adapters.answering import MAX_NEW_TOKENS
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.data.media import open_image
from flamingo_ft.model.geometry import Corners

from .decoding import Decoding
from .predictor import Predictor
from .prompts import make_prompt


def answer(
    adapter: str | Path,
    images: Sequence[str | Path],
    prompt: str | None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    start: str | Path | None = None,
    quantization: str | Quantization | None = None,
    dtype: str = "auto",
    **options: Any,
) -> str:
    """Load an adapter or a merged model and answer one prompt about image files; see `Predictor.__call__`.

    start, quantization, dtype: see `Predictor.from_pretrained`.
    """
    loading = {"start": start, "quantization": quantization, "dtype": dtype}
    options["max_new_tokens"] = max_new_tokens
    return answer_with_boxes(adapter, images, prompt, **loading, **options)[0]


def answer_with_boxes(
    adapter: str | Path,
    images: Sequence[str | Path],
    prompt: str | None,
    *,
    start: str | Path | None = None,
    quantization: str | Quantization | None = None,
    dtype: str = "auto",
    **options: Any,
) -> tuple[str, list[Corners]]:
    """Return `answer`, and the boxes in it in pixels of the first image."""
    question = make_prompt(list(images), prompt)
    decoding = Decoding(**options)
    for path in images:
        open_image(path)  # a bad path should fail before the model is loaded
    predictor = Predictor.from_pretrained(
        adapter, start=start, quantization=quantization, dtype=dtype, image_cache_mib=0
    )
    predictor.decoding = decoding
    (text,) = predictor.answer([question])
    return text, predictor.boxes_in(text, images[0]) if images else []
