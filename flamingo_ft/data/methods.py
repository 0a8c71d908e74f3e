"""What each training method reads: SFT reads samples with one answer, DPO reads preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor

from .encode import encode_within
from .pairs import encode_pair
from .sample import Sample
from .stream.order import WeightedSource

ENCODE: dict[str, Callable[..., Any]] = {"sft": encode_within, "dpo": encode_pair}


def check_method(sources: Sequence[WeightedSource], method: str) -> None:
    """Raise UserError for a source that ``method`` cannot train on."""
    for weighted in sources:
        source = weighted.source
        if source.is_preference and method == "sft":
            raise UserError(
                f"{source.name}: expected samples with one answer, got preference pairs; "
                "set train.method to dpo, or name another format"
            )
        if not source.is_preference and method == "dpo":
            raise UserError(
                f"{source.name}: train.method dpo expects preference pairs (prompt, chosen, rejected), got "
                f"{source.format} samples; name such data, or set train.method to sft"
            )


def encoder(processor: FlamingoProcessor, recipe: Recipe, limit: int) -> Callable[[Sample], Any]:
    """Return the function from a sample to its tokens, at most ``limit`` per text, for the recipe's
    method."""
    return partial(ENCODE[recipe.train.method], processor, max_text_tokens=limit, policy=recipe.data.too_long)
