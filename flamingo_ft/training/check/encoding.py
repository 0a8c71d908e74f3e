"""What a sample's text becomes, and what each policy for longer ones would take of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import Encoded
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.too_long import Dropped, encode_within
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor

POLICIES = ("drop_sample", "drop_turns", "truncate_text")
UNLIMITED = 2**62  # text tokens


@dataclass(frozen=True)
class Text:
    """A sample's text.

    encoded: what trains; None where the recipe drops the sample, or there is a ``problem``. losses: of a sample that is
    too long, what each policy takes away of it: samples, turns (exchanges), tokens and images.
    """

    encoded: Encoded | None = None
    problem: str | None = None
    losses: dict[str, dict[str, int]] = field(default_factory=dict)


class Encoding:
    """From samples to their `Text`, as a recipe has them encoded."""

    def __init__(self, processor: FlamingoProcessor, data: DataSection, limit: int):
        self.processor, self.policy, self.limit = processor, data.too_long, limit

    def __call__(self, sample: Sample) -> Text:
        try:
            whole = encode_within(self.processor, sample, UNLIMITED, "drop_sample")
            if isinstance(whole, Encoded) and len(whole.input_ids) <= self.limit:
                return Text(whole)
        except UserError as error:
            return Text(problem=str(error))
        losses = self._losses(sample, whole) if isinstance(whole, Encoded) else {}
        try:
            chosen = encode_within(self.processor, sample, self.limit, self.policy)
        except UserError as error:
            return Text(problem=str(error), losses=losses)
        return Text(None if isinstance(chosen, Dropped) else chosen, losses=losses)

    def _losses(self, sample: Sample, whole: Encoded) -> dict[str, dict[str, int]]:
        everything = {
            "samples": 1,
            "turns": max(1, sum(message["role"] == "assistant" for message in sample.messages)),
            "tokens": len(whole.input_ids),
            "images": whole.images,
        }
        outcomes = {policy: encode_within(self.processor, sample, self.limit, policy) for policy in POLICIES}
        return {
            policy: everything if isinstance(outcome, Dropped) else {"samples": 0, **asdict(outcome.cut)}
            for policy, outcome in outcomes.items()
        }
