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

ENCODE = {"sft": encode_within, "dpo": encode_pair}


def check_method(sources: Sequence[WeightedSource], method: str) -> None:
    """Refuse sources that do not have what ``method`` learns from."""
    for mixed in sources:
        are_pairs = mixed.source.format == "preference"
        if are_pairs and method == "sft":
            raise UserError(
                f"{mixed.source.name}: found preference pairs, wanted samples with one answer; "
                "set train.method to dpo, or name another format"
            )
        if not are_pairs and method == "dpo":
            raise UserError(
                f"{mixed.source.name}: found {mixed.source.format} samples, wanted preference pairs (prompt, chosen, "
                "rejected) for train.method dpo; name such data, or set train.method to sft"
            )


def encoder(processor: FlamingoProcessor, recipe: Recipe, limit: int) -> Callable[[Sample], Any]:
    """From a sample to the tokens, at most ``limit`` in each text, that the recipe's method learns from."""
    return partial(ENCODE[recipe.train.method], processor, max_text_tokens=limit, policy=recipe.data.too_long)
