"""How answers are decoded: options under transformers' names, checked before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from flamingo_ft.adapters.answering import MAX_NEW_TOKENS
from flamingo_ft.errors import UserError

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # any of them turns sampling on
MIN_TEMPERATURE = 1e-3
BEAMS = ("length_penalty", "early_stopping")  # have a meaning with several beams only


@dataclass(frozen=True)
class Decoding:
    """Options of ``generate``, named as in transformers' `GenerationConfig`. By default, decoding is greedy.

    max_new_tokens: longest answer in tokens, end token included. num_beams: beam search with more than one.
    temperature, top_k, top_p, min_p: any of them turns sampling on; a temperature of 0 turns it off.
    stop_strings: texts at which an answer ends; they are not part of it. seed: of sampling; without one,
    torch's random state decides.

    Raises UserError for a value out of range and for options that exclude each other.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        for name, (is_valid, expected) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and is_valid(value)):
                raise UserError(f"{name}: must be {expected}, got {value:g}; correct it")
        if "" in self.stop_strings:
            raise UserError("stop_strings: got an empty text, which every answer begins with; remove it")
        self._check_combinations()

    def _check_combinations(self) -> None:
        given = [name for name in SAMPLING if getattr(self, name) is not None]
        if self.temperature == 0 and len(given) > 1:
            raise UserError(
                f"{given[1]}: got it with temperature 0, which decodes greedily; remove one of them"
            )
        if self.seed is not None and not self.samples:
            raise UserError(
                f"seed: got {self.seed}, but only sampling uses it; set temperature, or remove it"
            )
        for name in BEAMS:
            if getattr(self, name) is not None and self.num_beams == 1:
                raise UserError(f"{name}: only beam search uses it; set num_beams to 2 or more, or remove it")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature != 0 and any(getattr(self, name) is not None for name in SAMPLING)

    def updated(self, **options: Any) -> Decoding:
        """Return a copy with the options that are not None replaced. Raises TypeError for an unknown one."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def generate_options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``generate``, except for its length and what ends an answer."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("max_new_tokens", "stop_strings", "seed", *(() if self.samples else SAMPLING)):
            del options[name]
        if self.samples and self.top_k is None:
            options["top_k"] = 0  # transformers' default, 50, was not asked for
        return {name: value for name, value in options.items() if value is not None} | {
            "do_sample": self.samples
        }


RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 1, "at least 1"),
    "min_new_tokens": (lambda value: value >= 0, "at least 0"),
    "num_beams": (lambda value: value >= 1, "at least 1"),
    "length_penalty": (lambda value: True, "a finite number"),
    # Scores divided by a smaller temperature overflow, which kills the CUDA context.
    "temperature": (
        lambda value: value == 0 or value >= MIN_TEMPERATURE,
        f"0, or at least {MIN_TEMPERATURE}",
    ),
    "top_k": (lambda value: value >= 1, "at least 1"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "no_repeat_ngram_size": (lambda value: value >= 1, "at least 1"),
}
