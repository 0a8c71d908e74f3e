"""All that is found in a recipe's data, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flamingo_ft.evaluation.questions import AnswerLengths
from flamingo_ft.formatting import percent, plural

from .numbers import Distribution
from .rows import Problem, Seen
from .text_form import TextForm

MADE_BY = "flamingo-ft check"


@dataclass
class Part:
    """One source of training or held-out samples, and sums over its rows.

    samples: rows that can be used. dropped: those that the policy for long samples drops. bad: those with problems.
    unread: columns of text, and keys of messages, that the schema does not read, and in how many rows.
    conversions: how many images and videos the reader changed in which way, by the names of `images.CONVERSIONS`.
    rewritten: samples with an answer that the chat template does not write in full.
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

    def add(self, seen: Seen) -> None:
        self.rows += 1
        self.bad += bool(seen.problems)
        self.dropped += seen.dropped
        for name in seen.unread:
            self.unread[name] = self.unread.get(name, 0) + 1
        if seen.problems or seen.dropped:
            return
        self.samples += 1
        self.turns += seen.turns
        self.images += seen.images
        self.videos += seen.videos
        self.text_tokens += seen.text_tokens
        self.label_tokens += seen.label_tokens
        for name, count in seen.conversions.items():
            self.conversions[name] = self.conversions.get(name, 0) + count
        self.rewritten += seen.rewritten


@dataclass
class TooLong:
    """limit: text tokens. samples: longer training samples. policies: what each takes away of them."""

    limit: int
    policy: str
    samples: int = 0
    policies: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, losses: dict[str, dict[str, int]]) -> None:
        self.samples += bool(losses)
        for policy, lost in losses.items():
            sums = self.policies.setdefault(policy, dict.fromkeys(lost, 0))
            sums.update({name: sums[name] + count for name, count in lost.items()})


@dataclass(frozen=True)
class Copies:
    """The same thing in several rows: how many there are, and the first of them, by file."""

    times: int
    rows: dict[str, list[int]]


@dataclass(frozen=True)
class Repeats:
    """copies: training samples that equal an earlier one. leaked: held-out samples that are trained on as well.

    images: distinct ones; repeated_images: those in more than one place; leaked_images: held-out samples with an image
    that is trained on as well. Of each the largest groups.
    """

    copies: int
    copy_groups: list[Copies]
    leaked: int
    leaked_groups: list[Copies]
    images: int
    repeated_images: int
    repeated_groups: list[Copies]
    leaked_images: int


@dataclass(frozen=True)
class Length:
    """How long training would be, in one process.

    epochs: passes over the data, of ``samples_per_epoch`` draws each; both None for streams.
    estimated: whether it depends on how samples are packed into rows, which is estimated from the first of them.
    """

    max_steps: int
    epochs: float | None
    samples_per_epoch: int | None
    estimated: bool

    @property
    def line(self) -> str:
        """The same in words."""
        steps = f"training: {plural(self.max_steps, 'optimizer step')}"
        if self.epochs is None:
            return steps
        about = "about " if self.estimated else ""
        return f"{steps}, {about}{self.epochs:.3g} epochs of {self.samples_per_epoch:,} samples"


@dataclass(frozen=True)
class Findings:
    """What `flamingo-ft check` tells. distributions: over the training samples as they train.

    problems: how many there are, in bad rows; first_problems: the first of them (problems.jsonl has all).
    answers: reference answers of the samples that evaluation uses.
    text_form: how dialogues are written.
    """

    recipe: str
    on_bad_sample: str
    max_bad_share: float
    parts: list[Part]
    distributions: dict[str, Distribution]
    too_long: TooLong
    repeats: Repeats
    problems: int
    first_problems: list[Problem]
    answers: AnswerLengths
    length: Length
    text_form: TextForm | None = None

    @property
    def bad(self) -> int:
        """Rows that cannot be used, trained on or held out."""
        return sum(part.bad for part in self.parts)

    @property
    def bad_share(self) -> float:
        """Of the training rows."""
        trained = [part for part in self.parts if part.split == "train"]
        return sum(part.bad for part in trained) / max(1, sum(part.rows for part in trained))

    @property
    def objection(self) -> str | None:
        """Why a run on this data would end; None where it would not."""
        if not any(part.samples for part in self.parts if part.split == "train"):
            return "found no sample to train on"
        if self.bad and self.on_bad_sample == "error":
            return f"found {self.bad:,} bad rows; mend or remove them, or set data.on_bad_sample to skip"
        if self.bad_share > self.max_bad_share:
            share = f"found {percent(self.bad_share)} of the training rows bad, the limit is {percent(self.max_bad_share)}"
            return f"{share}; mend them, or raise data.max_bad_share"
        return None

    @property
    def warnings(self) -> list[str]:
        """What a run on this data would do that its user hardly wants, a line each."""
        lines = [self.answers.warning, self.text_form.warning if self.text_form else None]
        if rewritten := sum(part.rewritten for part in self.parts):
            lines.append(
                f"the chat template leaves out or changes words of answers in {rewritten:,} samples (many leave out the "
                "reasoning of earlier answers); to train on every word, set data.template to flamingo"
            )
        return [line for line in lines if line]

    @property
    def text_lines(self) -> list[str]:
        """How dialogues are written, in words."""
        return self.text_form.lines if self.text_form else []

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        verdict = {"usable": self.objection is None, "objection": self.objection}
        verdict |= {"warnings": self.warnings, "training": self.length.line, "text_lines": self.text_lines}
        return {"made_by": MADE_BY, **verdict, "bad": self.bad, "bad_share": self.bad_share, **asdict(self)}
