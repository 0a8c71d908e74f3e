"""The examples of a batch, prepared row by row in worker processes, and counts of used and skipped rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch.utils.data import Dataset

from flamingo_ft.errors import UserError

from .encode import Cut, Dropped
from .sample import Sample
from .sample_order import SampleIndex
from .sources import Source

# Rows before the share of bad ones is judged; fewer if an epoch has fewer.
MIN_ROWS_JUDGED = 100
MAX_SKIPPED_IN_A_ROW = 10_000  # of a stream, whose epoch has no known length


class EncodedRow(Protocol):
    """What every training method encodes a row to.

    text_tokens: its length. label_tokens: tokens in the loss. images: how many of the sample's first images
    and videos are in it. cut: what was cut. rewritten: whether the chat template changes an answer.
    """

    @property
    def text_tokens(self) -> int: ...

    @property
    def label_tokens(self) -> int: ...

    @property
    def images(self) -> int: ...

    @property
    def cut(self) -> Cut: ...

    @property
    def rewritten(self) -> bool: ...


@dataclass(frozen=True)
class Example:
    """A row to train on: its token ids (for a pair, both halves) and its media, in order."""

    where: str
    encoded: EncodedRow
    media: list[Any]


@dataclass(frozen=True)
class SkippedRow:
    """A row that is not trained on.

    bad: whether it cannot be used (damaged, malformed); if not, a policy of the recipe dropped it.
    """

    number: int
    where: str
    reason: str
    bad: bool


class ExampleDataset(Dataset):
    """Maps a `SampleIndex` to an `Example`, or to a `SkippedRow` with the reason.

    Args:
        encode: sample -> its tokens, or why a policy drops it.
        load_media: (sample, number of media kept, sample number, which seeds augmentation) -> tensors.
        write_boxes: (sample with boxes, sample number) -> the sample with its boxes as text.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[Sample], EncodedRow | Dropped],
        load_media: Callable[[Sample, int, int], list[Any]],
        write_boxes: Callable[[Sample, int], Sample] | None = None,
    ):
        self.sources, self.encode, self.load_media = sources, encode, load_media
        self.write_boxes = write_boxes

    def __getitem__(self, index: SampleIndex) -> Example | SkippedRow:
        source = self.sources[index.source]
        where = f"{source.name}: row {index.row}"
        try:
            raw = source.raw(index.row) if index.raw is None else index.raw
            where = source.where(raw)
            sample = source.sample(index.row, raw)
            if sample.boxes and self.write_boxes is not None:
                sample = self.write_boxes(sample, index.number)
            encoded = self.encode(sample)
            if isinstance(encoded, Dropped):
                return SkippedRow(index.number, where, encoded.reason, bad=False)
            return Example(where, encoded, self.load_media(sample, encoded.images, index.number))
        except UserError as error:
            return SkippedRow(index.number, where, str(error), bad=True)


@dataclass
class DataStats:
    """Counts over the rows so far; a row counts each time it is drawn.

    `count_skipped` raises UserError for the first bad row, or with ``skip_bad`` when the share of bad rows
    exceeds ``max_bad_share``, and when nothing is left to train on.
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
        """Count a row that is trained on. rewritten: whether its chat template changes an answer."""
        self.seen += 1
        self.rewritten += rewritten
        self._in_a_row = 0
        if cut != Cut():
            self.shortened.update({"samples": 1, **asdict(cut)})

    def count_skipped(self, row: SkippedRow) -> None:
        """Count a row that is not trained on."""
        if row.bad and not self.skip_bad:
            raise UserError(row.reason)
        self.seen += 1
        self.bad += row.bad
        self.dropped += not row.bad
        (self.bad_rows if row.bad else self.dropped_rows).setdefault(row.where, row.reason)
        self._in_a_row += 1
        self._check_bad_share()
        if self._in_a_row >= (self.epoch_length or MAX_SKIPPED_IN_A_ROW):
            raise UserError(
                f"data.train: no sample to train on among {self._in_a_row} rows, the last: {row.reason}; "
                "fix the data"
            )

    def _check_bad_share(self) -> None:
        """Judge the share of bad rows among different rows: later epochs repeat them."""
        bad, seen = len(self.bad_rows), min(self.seen, self.epoch_length or self.seen)
        judged = max(seen, min(MIN_ROWS_JUDGED, self.epoch_length or MIN_ROWS_JUDGED))
        if bad > self.max_bad_share * judged:
            raise UserError(
                f"data.max_bad_share: got {bad} of {seen} rows bad, more than {self.max_bad_share:g} of them "
                f"(the last: {next(reversed(self.bad_rows.values()))}); fix them, or raise data.max_bad_share"
            )

    @property
    def skipped_rows(self) -> dict[str, str]:
        """Why each row was skipped, by "FILE: row N"."""
        return self.bad_rows | self.dropped_rows

    def metrics(self) -> dict[str, Any]:
        """Return the counts as ``metrics.json`` has them."""
        counts = {
            "rows": self.seen,
            "skipped": self.bad,
            "dropped": self.dropped,
            "shortened": dict(self.shortened),
        }
        return counts | ({"rewritten": self.rewritten} if self.rewritten else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run has to know."""
        return self.metrics() | {
            "bad_rows": dict(self.bad_rows),
            "dropped_rows": dict(self.dropped_rows),
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.seen, self.bad, self.dropped = state["rows"], state["skipped"], state["dropped"]
        self.bad_rows, self.dropped_rows = dict(state["bad_rows"]), dict(state["dropped_rows"])
        self.rewritten = state.get("rewritten", 0)
        self.shortened, self._in_a_row = Counter(state["shortened"]), state["in_a_row"]


def total_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of `DataStats.metrics` of several processes."""
    total: dict[str, Any] = {
        key: sum(record[key] for record in records) for key in ("rows", "skipped", "dropped")
    }
    rewritten = sum(record.get("rewritten", 0) for record in records)
    if rewritten:
        total["rewritten"] = rewritten
    shortened = sum((Counter(record["shortened"]) for record in records), Counter())
    return total | {"shortened": dict(shortened)}
