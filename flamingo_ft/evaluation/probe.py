"""The probe of a recipe: can its frozen vision tower tell the answers apart at all?

For each question, classifiers are fitted on the tower's tokens of the training images, standardized by
channel, and tested on the held-out ones. ``probe.json`` has the results; `probe_verdict` compares a model
with them.

Shapes: N samples, I images of a sample, V tokens, D width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.backbones.precision import autocast_dtype
from flamingo_ft.config import PROBE_FILE, Recipe
from flamingo_ft.data import OpenedData
from flamingo_ft.data.sample import display_text
from flamingo_ft.formatting import one_line
from flamingo_ft.progress import progress_bars

from .classifiers import (
    Standardizer,
    fit_attention_pooling,
    fit_logistic_regression,
    nearest_neighbour,
)
from .metrics import normalize
from .probe_questions import (
    FEW,
    MIN_SAMPLES_PER_ANSWER,
    ProbeQuestion,
    ProbeQuestions,
    choose_questions,
    media_of,
)
from .questions import Question, questions_of
from .tower_tokens import TowerTokens, read_tokens

MADE_BY = "flamingo-ft check --probe"
MAX_ROWS = 100_000  # training samples that are read
UNREADABLE = "with unreadable images"
SIGNIFICANT = 2.0  # standard errors
MIN_GAIN = 0.05  # smaller gains over the majority share are of no use: the best of three is chosen


@dataclass(frozen=True)
class ProbeResult:
    """How well classifiers on the tower's tokens answer one question; shares of held-out samples.

    Attributes:
        question: one of its wordings; task, wordings: as `question_key` has them.
        kind: "few answers" (all three classifiers) or "many answers" (retrieval by nearest neighbour).
        images: images of each sample; their features are concatenated in order and, of two images, followed
            by the absolute difference, because a linear probe cannot compare otherwise.
        answers: training samples by normalized answer.
        majority: share reached by always giving the most frequent held-out answer.
        nearest_neighbour: 1 nearest neighbour by cosine similarity of mean-pooled tokens.
        linear_pooled, linear_attended: logistic regression on tokens averaged evenly, and by a learned query.
        left_out: number of samples by reason.
    """

    question: str
    task: str
    wordings: list[str]
    kind: str
    images: int
    train_samples: int
    eval_samples: int
    answers: dict[str, int]
    majority: float
    nearest_neighbour: float
    linear_pooled: float | None
    linear_attended: float | None
    left_out: dict[str, int]

    @property
    def best(self) -> float:
        """The largest share of the classifiers."""
        shares = (self.nearest_neighbour, self.linear_pooled, self.linear_attended)
        return max(share for share in shares if share is not None)

    @property
    def tells_apart(self) -> bool:
        """Whether the best share is clearly above the majority's."""
        error = math.sqrt(self.majority * (1 - self.majority) / self.eval_samples)
        return self.best - self.majority > max(SIGNIFICANT * error, MIN_GAIN)

    @property
    def hardly_repeats(self) -> bool:
        """Whether the answers have so few training samples that a wrong nearest neighbour shows nothing."""
        return self.train_samples < MIN_SAMPLES_PER_ANSWER * len(self.answers)

    def record(self) -> dict[str, Any]:
        """Return the result as JSON-compatible values."""
        return {**asdict(self), "best": self.best, "tells_apart": self.tells_apart}


@dataclass(frozen=True)
class Probe:
    """All results of a probe. The field names are the keys of probe.json.

    Attributes:
        recipe_digest: of the recipe's tower and data, by which a run recognizes its probe.
        tokens, width: of an image; ``media`` distinct images and videos were encoded.
        tiled: whether large images are tiled, and the tokens of an image averaged over its views.
        left_out: held-out samples of questions that were not probed, by reason.
        tower_seconds, probe_seconds: time for the tokens, and for all classifiers.
    """

    recipe_digest: str
    tower: str
    tokens: int
    width: int
    media: int
    tiled: bool
    questions: list[ProbeResult]
    left_out: dict[str, int]
    tower_seconds: float
    probe_seconds: float

    def record(self) -> dict[str, Any]:
        """Return the probe as JSON-compatible values."""
        return {
            "made_by": MADE_BY,
            **asdict(self),
            "questions": [result.record() for result in self.questions],
        }

    def save(self, folder: Path) -> None:
        """Write probe.json."""
        text = json.dumps(self.record(), indent=2, ensure_ascii=False)
        (folder / PROBE_FILE).write_text(text + "\n", encoding="utf-8")


def load_probe(folder: Path, recipe: Recipe) -> Probe | None:
    """Read probe.json; None if there is none, or if its tower or data are not the recipe's."""
    try:
        values = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.pop("made_by", None) != MADE_BY:
        return None
    if values.get("recipe_digest") != recipe_digest(recipe):
        return None
    computed = ("best", "tells_apart")
    results = [
        ProbeResult(**{name: value for name, value in result.items() if name not in computed})
        for result in values.pop("questions")
    ]
    return Probe(**values, questions=results)


def find_probe(folder: Path, recipe: Recipe) -> Probe | None:
    """Read the probe of a recipe's tower and data from the folder of its run or of another one beside it.

    Of several, that of the run itself, else the newest.
    """
    probe = load_probe(folder, recipe)
    if probe is not None:
        return probe
    files = [file for file in folder.absolute().parent.glob(f"*/{PROBE_FILE}") if file.is_file()]
    newest_first = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    return next(filter(None, (load_probe(file.parent, recipe) for file in newest_first)), None)


def recipe_digest(recipe: Recipe) -> str:
    """Return a digest of what a probe depends on: the tower, the data and the seed of their split."""
    data = recipe.data.model_dump(
        mode="json", include={"train", "eval", "eval_fraction", "video_frames", "tiles", "on_bad_sample"}
    )
    parts = [recipe.model.vision.model_dump(mode="json"), data, recipe.train.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_probe(recipe: Recipe, data: OpenedData) -> Probe:
    """Probe the recipe's tower: questions of the training samples and of the held-out samples.

    Reads the tower's weights and none of the language model. Raises UserError, before the tower is loaded, if
    nothing can be probed.
    """
    samples = itertools.islice(data.samples(data.train), MAX_ROWS)
    train = (question for sample in samples for question in questions_of([sample]))
    evaluation = questions_of(data.eval_samples(recipe.eval.max_samples))
    chosen = choose_questions(train, evaluation, recipe.train.seed)
    chosen.check()
    began = time.monotonic()
    media = media_of(chosen.probed)
    tokens = read_tokens(recipe, media, autocast_dtype(recipe.train.precision))
    encoded = time.monotonic()
    results = list(_results(chosen, tokens))
    return Probe(
        recipe_digest(recipe),
        recipe.model.vision.name,
        *tokens.shape,
        len(tokens.mean),
        recipe.data.tiles is not None,
        results,
        dict(chosen.left_out),
        round(encoded - began, 1),
        round(time.monotonic() - encoded, 1),
    )


def _results(chosen: ProbeQuestions, tokens: TowerTokens) -> Iterator[ProbeResult]:
    """Probe each question, unless too few of its images can be read."""
    with progress_bars(stderr=True) as progress:
        bar = progress.add_task("probing", total=len(chosen.probed), note="")
        for question in chosen.probed:
            question.drop(UNREADABLE, lambda one: all(medium in tokens.mean for medium in one.images))
            if question.obstacle is None:
                yield probe_question(question, tokens)
            else:
                chosen.left_out[UNREADABLE] += len(question.eval)
            progress.advance(bar)


def probe_question(question: ProbeQuestion, tokens: TowerTokens) -> ProbeResult:
    """Fit the classifiers of one question on its training samples; score them on its held-out samples."""
    classes = {answer: number for number, answer in enumerate(question.answers)}
    labels, targets = (
        torch.tensor([classes[normalize(one.answer)] for one in part])
        for part in (question.train, question.eval)
    )

    def score(predicted: Tensor) -> float:
        return (predicted == targets).double().mean().item()

    train, evaluation = _standardized(*(_mean_features(s, tokens) for s in (question.train, question.eval)))
    linear_pooled = linear_attended = None
    if question.kind == FEW:
        linear_pooled = score(fit_logistic_regression(train, labels, len(classes)).predict(evaluation))
        attended = _standardized(*_attended_features(question, tokens, labels, len(classes)))
        linear_attended = score(
            fit_logistic_regression(attended[0], labels, len(classes)).predict(attended[1])
        )
    task, _, images = question.wordings[0]
    return ProbeResult(
        question=one_line(display_text(question.train[0].messages[-1])),
        task=task,
        wordings=[text for _, text, _ in question.wordings],
        kind=question.kind,
        images=images,
        train_samples=len(labels),
        eval_samples=len(targets),
        answers=dict(question.answers),
        majority=targets.bincount().max().item() / len(targets),
        nearest_neighbour=score(nearest_neighbour(train, labels, evaluation)),
        linear_pooled=linear_pooled,
        linear_attended=linear_attended,
        left_out=dict(question.left_out),
    )


# --- features of samples


def _mean_features(samples: Sequence[Question], tokens: TowerTokens) -> Tensor:
    """Return the mean-pooled tokens of samples, joined, (N, I * D) or, of two images, (N, 3 * D)."""
    return _joined(torch.stack([torch.stack([tokens.mean[m] for m in one.images]) for one in samples]))


def _attended_features(
    question: ProbeQuestion, tokens: TowerTokens, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Return the attended tokens of both splits, joined as the mean-pooled ones."""
    train, evaluation = (
        torch.stack([tokens.tokens[medium] for one in samples for medium in one.images])
        for samples in (question.train, question.eval)
    )
    pooling = fit_attention_pooling(train, labels, classes, question.images)
    joined = [_joined(pooling(part).unflatten(0, (-1, question.images))) for part in (train, evaluation)]
    return joined[0], joined[1]


def _joined(features: Tensor) -> Tensor:
    """Concatenate the features of a sample's images, (N, I, D); of two, also their absolute difference."""
    parts = list(features.unbind(1))
    if len(parts) == 2:
        parts.append((parts[0] - parts[1]).abs())
    return torch.cat(parts, dim=1)


def _standardized(train: Tensor, evaluation: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize both splits by the channels of the training samples."""
    standardize = Standardizer.fit(train)
    return standardize(train), standardize(evaluation)
