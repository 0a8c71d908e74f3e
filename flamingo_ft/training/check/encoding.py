"""What a sample's text becomes, and what each policy for longer ones would take of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import IGNORED, Encoded, encode
from flamingo_ft.data.sample import Sample
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor

POLICIES = ("drop_sample", "drop_turns", "truncate_text")
LOSSES = ("samples", "turns", "text_tokens", "images")


@dataclass(frozen=True)
class Text:
    """A sample's text.

    written: tokens before any are taken away. encoded: what trains; None where the recipe's policy drops the sample.
    losses: of a sample that is too long, what each policy takes away of it.
    """

    written: int
    encoded: Encoded | None
    losses: dict[str, dict[str, int]] = field(default_factory=dict)


class Encoding:
    """From samples to their `Text`. UserError for what cannot be encoded or has nothing to learn."""

    def __init__(self, processor: FlamingoProcessor, data: DataSection, limit: int):
        self.processor, self.data, self.limit = processor, data, limit

    def __call__(self, sample: Sample) -> Text:
        encoded = encode(self.processor, sample.messages)
        found = len(encoded.input_ids)
        if found > self.limit:
            raise UserError(f"found {found} text tokens, the limit is {self.limit}")
        if all(label == IGNORED for label in encoded.labels):
            raise UserError("found no word of the assistant's to learn; remove the sample")
        return Text(found, encoded)
