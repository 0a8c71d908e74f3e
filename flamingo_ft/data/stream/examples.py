"""From a draw to what a batch is made of; this is the work that worker processes do.

What became of the rows that were looked at: how many were used, and which were left out and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.utils.data import Dataset

from flamingo_ft.data.encode import Cut, Dropped, Encoded
from flamingo_ft.data.pairs import EncodedPair
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.sources import Source
from flamingo_ft.errors import UserError

from .order import SampleIndex


@dataclass(frozen=True)
class Example:
    """A row that trains: its text in token ids, or both texts of a pair, and its media as tensors, in order."""

    where: str
    encoded: Encoded | EncodedPair
    media: list[Any]


class ExampleDataset(Dataset):
    """From draws to `Example` rows, or `SkippedRow` ones with the reason.

    encode: from a sample to its tokens, or why a policy drops it. read_media: from the sample, how many of its media are
    kept, and the draw's number, which seeds what is random, to their tensors.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[Sample], Encoded | EncodedPair | Dropped],
        read_media: Callable[[Sample, int, int], list[Any]],
    ):
        self.sources, self.encode, self.read_media = sources, encode, read_media

    def __getitem__(self, draw: SampleIndex) -> Example | SkippedRow:
        source = self.sources[draw.source]
        where = f"{source.name}: row {draw.row}"
        try:
            raw = source.raw(draw.row) if draw.raw is None else draw.raw
            where = source.where(raw)
            sample = source.sample(draw.row, raw)
            encoded = self.encode(sample)
            if isinstance(encoded, Dropped):
                return SkippedRow(draw.number, where, encoded.reason, bad=False)
            return Example(where, encoded, self.read_media(sample, encoded.images, draw.number))
        except UserError as error:
            return SkippedRow(draw.number, where, str(error), bad=True)


JUDGED_FROM = 100  # rows, before which a share means little; fewer where an epoch has fewer


@dataclass(frozen=True)
class SkippedRow:
    """A row that does not train. bad: it cannot be used (damaged, malformed), else a policy of the recipe dropped it."""

    number: int
    where: str
    reason: str
    bad: bool


@dataclass
class DataStats:
    """Counts over the rows looked at so far.

    Raises UserError through `add` for the first bad row, or, where they are skipped, once they are more than
    ``max_bad_share``, and where nothing is left to train on.
    """

    skip_bad: bool
    max_bad_share: float
    epoch_length: int | None
    seen: int = 0
    bad: int = 0
    dropped: int = 0
    rewritten: int = 0
    shortened: Counter = field(default_factory=Counter)
    bad_rows: dict[str, str] = field(default_factory=dict)
    dropped_rows: dict[str, str] = field(default_factory=dict)
    _in_a_row: int = 0

    def count_used(self, cut: Cut, rewritten: bool = False) -> None:
        """Count a row that trains, what a policy took away of it, and whether its chat template changes an answer."""
        self.seen += 1
        self.rewritten += rewritten
        self._in_a_row = 0
        if cut != Cut():
            self.shortened.update({"samples": 1, **asdict(cut)})

    def count_skipped(self, row: SkippedRow) -> None:
        """Count a row that does not train."""
        if row.bad and not self.skip_bad:
            raise UserError(row.reason)
        self.seen += 1
        self.bad += row.bad
        self.dropped += not row.bad
        (self.bad_rows if row.bad else self.dropped_rows).setdefault(row.where, row.reason)
        self._in_a_row += 1
        self._check_share()
        if self._in_a_row >= (self.epoch_length or 10_000):
            raise UserError(
                f"data.train: got no sample to train on among {self._in_a_row} rows, the last: {row.reason}"
            )

    def _check_share(self) -> None:
        """Of different rows: those of later epochs are the same ones again."""
        bad, seen = len(self.bad_rows), min(self.seen, self.epoch_length or self.seen)
        judged = max(seen, min(JUDGED_FROM, self.epoch_length or JUDGED_FROM))
        if bad > self.max_bad_share * judged:
            raise UserError(
                f"data.max_bad_share: got {bad} of {seen} rows bad, more than {self.max_bad_share:g} of them "
                f"(the last: {next(reversed(self.bad_rows.values()))}); mend them, or raise data.max_bad_share"
            )

    @property
    def skipped_rows(self) -> dict[str, str]:
        """Where each row is that did not train, and why."""
        return self.bad_rows | self.dropped_rows

    def metrics(self) -> dict[str, Any]:
        """The counts, as ``metrics.json`` has them; a row counts each time that it is looked at."""
        return {
            "rows": self.seen,
            "skipped": self.bad,
            "dropped": self.dropped,
            "shortened": dict(self.shortened),
        } | ({"rewritten": self.rewritten} if self.rewritten else {})

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on later has to know."""
        rows = {
            "bad_rows": dict(self.bad_rows),
            "dropped_rows": dict(self.dropped_rows),
            "in_a_row": self._in_a_row,
        }
        return self.metrics() | rows

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.seen, self.bad, self.dropped = state["rows"], state["skipped"], state["dropped"]
        self.bad_rows, self.dropped_rows = dict(state["bad_rows"]), dict(state["dropped_rows"])
        self.rewritten = state.get("rewritten", 0)
        self.shortened, self._in_a_row = Counter(state["shortened"]), state["in_a_row"]


def total_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what several processes counted, each as `DataStats.metrics` gives it."""
    whole = {key: sum(record[key] for record in records) for key in ("rows", "skipped", "dropped")}
    rewritten = sum(record.get("rewritten", 0) for record in records)
    whole |= {"rewritten": rewritten} if rewritten else {}
    return whole | {"shortened": dict(sum((Counter(record["shortened"]) for record in records), Counter()))}
