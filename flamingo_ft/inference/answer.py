"""One question to a model on disk. Model cards name this module; to ask often, use `Predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo_ft.adapters.answering import MAX_NEW_TOKENS
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.data.media import open_image

from .decoding import Decoding
from .predictor import Predictor
from .prompts import make_prompt


def answer(
    adapter: str | Path,
    images: Sequence[str | Path],
    prompt: str | None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    quantization: str | Quantization | None = None,
    **options: Any,
) -> str:
    """Load an adapter or a merged model and answer one prompt about image files; see `Predictor.__call__`."""
    question = make_prompt(list(images), prompt)
    decoding = Decoding(max_new_tokens, **options)
    for path in images:
        open_image(path)  # a bad path should fail before the model is loaded
    predictor = Predictor.from_pretrained(adapter, quantization=quantization, image_cache_mib=0)
    predictor.decoding = decoding
    return predictor.answer([question])[0]
