"""What a sample's text becomes, and what each policy for longer ones would take of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from flamingo_ft.config import DataSection
from flamingo_ft.data.encode import Encoded
from flamingo_ft.data.pair import EncodedPair, encode_pair
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.too_long import Dropped, TooLong, encode_within
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import answer_lengths, end_tokens_of
from flamingo_ft.model import FlamingoProcessor

POLICIES = ("drop_sample", "drop_turns", "truncate_text")
UNLIMITED = 2**62  # text tokens


@dataclass(frozen=True)
class Text:
    """A sample's text, or both texts of a pair.

    encoded: what trains; None where the recipe drops the sample, or there is a ``problem``. losses: of a sample that is
    too long, what each policy takes away of it: samples, turns (exchanges), tokens and images. answers: tokens of each
    reference answer, before anything is cut.
    """

    encoded: Encoded | EncodedPair | None = None
    problem: str | None = None
    losses: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: tuple[int, ...] = ()


def texts_of(encoded: Encoded | EncodedPair) -> tuple[Encoded, ...]:
    """What is encoded: one text, or those of a pair, the better answer's first."""
    return (encoded.chosen, encoded.rejected) if isinstance(encoded, EncodedPair) else (encoded,)


class Encoding:
    """From samples to their `Text`, as a recipe has them encoded; pairs: both their texts, where ``compares``."""

    def __init__(self, processor: FlamingoProcessor, data: DataSection, limit: int, compares: bool = False):
        self.processor, self.policy, self.limit, self.compares = processor, data.too_long, limit, compares
        self._ends = end_tokens_of(processor)

    def __call__(self, sample: Sample) -> Text:
        try:
            whole = self._within(sample, UNLIMITED, "drop_sample")
            answers = () if isinstance(whole, Dropped) else self._answers(sample, whole)
            if not isinstance(whole, Dropped) and whole.text_tokens <= self.limit:
                return Text(whole, answers=answers)
        except UserError as error:
            return Text(problem=str(error))
        losses = {} if isinstance(whole, Dropped) else self._losses(sample, whole)
        try:
            chosen = self._within(sample, self.limit, self.policy)
        except UserError as error:
            return Text(problem=str(error), losses=losses)
        return Text(None if isinstance(chosen, Dropped) else chosen, losses=losses, answers=answers)

    def _answers(self, sample: Sample, whole: Encoded | EncodedPair) -> tuple[int, ...]:
        return tuple(answer_lengths(self.processor, sample, texts_of(whole)[0], self._ends))

    def _within(self, sample: Sample, limit: int, policy: TooLong) -> Encoded | EncodedPair | Dropped:
        encode = encode_pair if self.compares and sample.rejected else encode_within
        return encode(self.processor, sample, limit, policy)

    def _losses(self, sample: Sample, whole: Encoded | EncodedPair) -> dict[str, dict[str, int]]:
        everything = {
            "samples": 1,
            "turns": max(1, sum(message["role"] == "assistant" for message in sample.messages)),
            "tokens": sum(text.text_tokens for text in texts_of(whole)),
            "images": whole.images,
        }
        outcomes = {policy: self._within(sample, self.limit, policy) for policy in POLICIES}
        return {
            policy: everything if isinstance(outcome, Dropped) else {"samples": 0, **asdict(outcome.cut)}
            for policy, outcome in outcomes.items()
        }
