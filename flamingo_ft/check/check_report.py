"""The results of a check of a recipe's data, as plain values: the content of check.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flamingo_ft.data.boxes import cut_boxes_warning
from flamingo_ft.evaluation.questions import AnswerLengths
from flamingo_ft.formatting import percent, plural, significant

from .image_sizes import ImageSizes
from .row_inspector import Problem, RowResult
from .text_checks import DialogueFormat

MADE_BY = "flamingo-ft check"
TRAIN, EVAL = "train", "held out"  # `SourceStats.split`, as check.json and the page have it
BINS = 40  # of a histogram, at most


@dataclass(frozen=True)
class Distribution:
    """Statistics and histogram of one number per sample.

    counts[i] samples lie in [edges[i], edges[i + 1]).
    """

    least: float
    median: float
    mean: float
    most: float
    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: np.ndarray, integers: bool = True, high: float | None = None) -> Distribution:
        """Bin ``values`` from 0 to ``high``, by default their maximum.

        integers: bin edges lie between whole numbers, so that every bin covers the same count of them.
        """
        if not len(values):
            return cls(0, 0, 0, 0, [0, 1], [0])
        high = float(values.max()) if high is None else high
        edges = _integer_edges(int(high)) if integers else np.linspace(0, high, BINS // 2 + 1)
        counts, _ = np.histogram(values, edges)
        return cls(
            least=float(values.min()),
            median=float(np.median(values)),
            mean=float(values.mean()),
            most=float(values.max()),
            edges=[float(edge) for edge in edges],
            counts=[int(count) for count in counts],
        )


def _integer_edges(high: int) -> np.ndarray:
    """Return the edges of at most `BINS` equal bins over the integers 0..high."""
    width = -(-(high + 1) // BINS)
    return np.arange(0, high + width + 1, width) - 0.5


@dataclass
class SourceStats:
    """Totals over the rows of one source.

    Attributes:
        split: `TRAIN` or `EVAL`.
        rows: all rows; ``samples`` of them are usable, ``bad`` have problems, and ``dropped`` are left out by
            data.too_long. Every count below ``bad``, except ``unread``, is over the usable rows.
        label_tokens: text tokens in the loss.
        unread: text columns and message keys that the schema ignores, with the number of rows that have them.
        conversions: images and videos by the conversion that the image reader applied (`images.CONVERSIONS`).
        rewritten: samples with an answer that the chat template does not reproduce verbatim.
        boxes: of which the model sees ``cut_boxes`` only in part.
    """

    name: str
    split: str
    format: str
    rows: int = 0
    samples: int = 0
    dropped: int = 0
    bad: int = 0
    turns: int = 0
    images: int = 0
    videos: int = 0
    text_tokens: int = 0
    label_tokens: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    conversions: dict[str, int] = field(default_factory=dict)
    rewritten: int = 0
    boxes: int = 0
    cut_boxes: int = 0

    def add(self, result: RowResult) -> None:
        self.rows += 1
        self.bad += bool(result.problems)
        self.dropped += result.dropped
        for name in result.unread:
            self.unread[name] = self.unread.get(name, 0) + 1
        if result.problems or result.dropped:
            return
        self.samples += 1
        self.turns += result.turns
        self.images += result.images
        self.videos += result.videos
        self.text_tokens += result.text_tokens
        self.label_tokens += result.label_tokens
        for name, count in result.conversions.items():
            self.conversions[name] = self.conversions.get(name, 0) + count
        self.rewritten += result.rewritten
        self.boxes += result.boxes
        self.cut_boxes += result.cut_boxes


@dataclass
class LongSampleStats:
    """Training samples longer than ``limit`` text tokens.

    policy: the recipe's data.too_long. policies: what each possible policy would remove in total.
    """

    limit: int
    policy: str
    samples: int = 0
    policies: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, losses: dict[str, dict[str, int]]) -> None:
        """Add what each policy removes of one sample; nothing if the sample is within the limit."""
        self.samples += bool(losses)
        for policy, removed in losses.items():
            totals = self.policies.setdefault(policy, dict.fromkeys(removed, 0))
            for name, count in removed.items():
                totals[name] += count


@dataclass(frozen=True)
class DuplicateGroup:
    """A sample or image that occurs ``times`` times, and the first of its rows by file."""

    times: int
    rows: dict[str, list[int]]


@dataclass(frozen=True)
class DuplicateStats:
    """Duplicate samples and images; each list has the largest groups only.

    Attributes:
        copies: training samples that equal an earlier one.
        leaked: held-out samples that equal a training sample.
        images: distinct images and videos, of which ``repeated_images`` occur more than once, and
            ``images_asked_again`` in several samples with the same images and prompt.
        leaked_images: held-out samples that share an image or video with a training sample.
    """

    copies: int
    copy_groups: list[DuplicateGroup]
    leaked: int
    leaked_groups: list[DuplicateGroup]
    images: int
    repeated_images: int
    images_asked_again: int
    repeated_groups: list[DuplicateGroup]
    leaked_images: int


@dataclass(frozen=True)
class TrainingLength:
    """How long training takes in a single process.

    Attributes:
        epochs: passes over the data, of ``samples_per_epoch`` samples each; both None for streamed data.
        estimated: the number of packed rows per epoch is estimated from the first samples.
    """

    max_steps: int
    epochs: float | None
    samples_per_epoch: int | None
    estimated: bool

    @property
    def line(self) -> str:
        steps = f"training: {plural(self.max_steps, 'optimizer step')}"
        if self.epochs is None or self.samples_per_epoch is None:
            return steps
        about = "about " if self.estimated else ""
        epochs = significant(self.epochs)
        noun = "epoch" if epochs == "1" else "epochs"
        return f"{steps}, {about}{epochs} {noun} of {plural(self.samples_per_epoch, 'sample')}"


@dataclass(frozen=True)
class CheckReport:
    """All results of a check. The field names are the keys of check.json.

    Attributes:
        parts: one entry per source, training sources first.
        distributions: over the training samples, after data.too_long was applied.
        problems: number of problems; ``first_problems`` are the first of them, problems.jsonl has all.
        answers: lengths of the reference answers that evaluation will use.
        image_sizes: None without images.
        text_form: how the chat template writes dialogues; None if `dialogue_format` cannot determine it.
        method_warnings: about the settings of the training method.
        lengths: of training by stage; without stages, under an empty name.
        probe: the content of probe.json; None without ``--probe`` or if it failed for ``probe_error``.
        probe_lines: what the probe says, in words.
    """

    recipe: str
    on_bad_sample: str
    max_bad_share: float
    parts: list[SourceStats]
    distributions: dict[str, Distribution]
    too_long: LongSampleStats
    repeats: DuplicateStats
    problems: int
    first_problems: list[Problem]
    answers: AnswerLengths
    lengths: dict[str, TrainingLength]
    method_warnings: list[str] = field(default_factory=list)
    image_sizes: ImageSizes | None = None
    text_form: DialogueFormat | None = None
    probe: dict[str, Any] | None = None
    probe_error: str | None = None
    probe_lines: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """Rows with problems, training and held-out."""
        return sum(part.bad for part in self.parts)

    @property
    def bad_share(self) -> float:
        """Share of the training rows that have problems."""
        train = [part for part in self.parts if part.split == TRAIN]
        return sum(part.bad for part in train) / max(1, sum(part.rows for part in train))

    @property
    def objection(self) -> str | None:
        """Why training on this data would fail; None if it would not."""
        if not any(part.samples for part in self.parts if part.split == TRAIN):
            return "got no usable training sample"
        if self.bad and self.on_bad_sample == "error":
            return f"got {plural(self.bad, 'bad row')}; fix or remove them, or set data.on_bad_sample to skip"
        if self.bad_share > self.max_bad_share:
            return (
                f"got {percent(self.bad_share)} bad training rows, the limit is "
                f"{percent(self.max_bad_share)}; fix them, or raise data.max_bad_share"
            )
        return None

    @property
    def warnings(self) -> list[str]:
        """What is probably unintended, one line each."""
        lines = [self.answers.warning, self.text_form.warning if self.text_form else None]
        rewritten = self._total("rewritten")
        if rewritten:
            lines.append(
                f"the chat template leaves out or changes words of answers in {rewritten:,} samples "
                "(many templates leave out the reasoning of earlier answers); "
                "to train on every word, set data.template to flamingo"
            )
        lines.append(cut_boxes_warning(self._total("cut_boxes"), self._total("boxes")))
        lines += self.method_warnings
        return [line for line in lines if line]

    def _total(self, count: str) -> int:
        """Return a count of `SourceStats` over all sources."""
        return sum(getattr(part, count) for part in self.parts)

    @property
    def notes(self) -> list[str]:
        """What may be worth a change, one line each."""
        note = self.image_sizes.note if self.image_sizes else None
        return [note] if note else []

    @property
    def training(self) -> str:
        """How long training takes, stage by stage."""
        lines = [
            f"stage {name}, {length.line}" if name else length.line for name, length in self.lengths.items()
        ]
        return "; ".join(lines)

    @property
    def text_lines(self) -> list[str]:
        """How dialogues are written, in words."""
        return self.text_form.lines if self.text_form else []

    def record(self) -> dict[str, Any]:
        """Return the report as JSON-compatible values."""
        return {
            "made_by": MADE_BY,
            "usable": self.objection is None,
            "objection": self.objection,
            "warnings": self.warnings,
            "notes": self.notes,
            "training": self.training,
            "text_lines": self.text_lines,
            "bad": self.bad,
            "bad_share": self.bad_share,
            **asdict(self),
        }
