"""What to try next after a run whose answers are not right often enough, from what the run measured.

The curve of the loss says whether more steps or more data would help; a probe, whether the tower is the
limit; and if neither is, the language model may have to adapt.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flamingo_ft.config import RECIPE_FILE, Recipe
from flamingo_ft.formatting import significant

from .image_use import MIN_QUESTIONS, REMEDY, correctness
from .probe import Probe
from .probe_verdict import OTHER_TOWER, tower_is_the_limit
from .reference_answers import by_task, is_free_text
from .results import AFTER, Results

GOOD = 0.9  # share of right answers from which on nothing is advised
CHANGE = 0.03  # relative change of the loss over the last quarter of the steps that counts
SIGNIFICANT = 2.0  # standard errors of the training loss
MIN_EVALUATIONS, MIN_ENTRIES = 4, 8  # of the held-out and of the training loss; fewer allow no conclusion
OVERFITTED = 1.3  # held-out loss relative to the training loss
MORE_DATA = "more or more varied training rows, or data.augmentation"

Entry = Mapping[str, Any]  # of the log
Course = Literal["falling", "rising", "flat"]


@dataclass(frozen=True)
class Trend:
    """How a loss went towards the end of a run. text: what was measured. last: its newest value."""

    course: Course
    text: str
    last: float


def add_advice(
    metrics: dict[str, Any],
    recipe: Recipe,
    results: Results,
    entries: Sequence[Entry],
    probe: Probe | None,
) -> None:
    """Add ``advice``, a list of sentences, to the ``eval`` record of a metrics.json if there is any.

    entries: the log of the run. probe: of its tower, if there is one.
    """
    if recipe.train.method != "sft" or len(results.questions) < MIN_QUESTIONS:
        return
    right, verdict = share_right(results), metrics["eval"].get("verdict") or ""
    if right >= GOOD:
        return
    lines = list(_of_loss(recipe, entries))
    if right < GOOD and REMEDY not in verdict:  # which says the rest; free text has no share
        lines += _of_model(recipe, results, entries, probe)
    if lines:
        metrics["eval"]["advice"] = lines


def share_right(results: Results) -> float:
    """Return the share of right answers; NaN if all of them are free text, whose exact match says little."""
    right, answers = [], results.texts(AFTER)
    for indices in by_task(results.questions).values():
        questions = [results.questions[index] for index in indices]
        if not is_free_text(questions):
            right += correctness(questions, [answers[index] for index in indices]).tolist()
    return sum(right) / len(right) if right else math.nan


def _of_loss(recipe: Recipe, entries: Sequence[Entry]) -> Iterator[str]:
    """Yield what the curves of the loss suggest: more steps, or more data."""
    held_out, training = held_out_trend(entries), training_trend(entries)
    trend = held_out or training
    if trend is None:
        return
    if trend.course == "falling":
        steps = recipe.train.max_steps
        yield f"{trend.text}: train longer, --resume with more train.epochs (or train.max_steps, now {steps})"
    elif trend.course == "rising":
        keep = "" if recipe.eval.keep == "best" else "; eval.keep=best ends with the best adapter"
        yield f"{trend.text}: the model overfits; {MORE_DATA}, or fewer steps{keep}"
    elif held_out and training and held_out.last > OVERFITTED * training.last:
        yield (
            f"the loss no longer falls, and is {significant(training.last)} in training, "
            f"{significant(held_out.last)} on held-out samples: {MORE_DATA}"
        )


def _of_model(
    recipe: Recipe, results: Results, entries: Sequence[Entry], probe: Probe | None
) -> Iterator[str]:
    """Yield what else may be the limit: the frozen language model, or the tower."""
    questions = results.questions
    trend = held_out_trend(entries) or training_trend(entries)
    if trend is not None and trend.course == "flat" and "language" not in recipe.lora.parts:
        yield (
            "the loss no longer falls, and the language model is frozen: train LoRA on it, from this run on: "
            f"{_lora_command(recipe)}"
        )
    if probe is not None and tower_is_the_limit(probe, questions, results.texts(AFTER)):
        yield f"the model answers as well as a probe of its tower: {OTHER_TOWER}"
    elif probe is None and any(question.images for question in questions):
        yield (
            f"{_quoted(recipe)} has no probe of this tower and data: flamingo-ft check "
            f"{_quoted(recipe)}/{RECIPE_FILE} --probe shows whether the tower can tell the answers apart; "
            f"if it cannot, {OTHER_TOWER}"
        )


def _lora_command(recipe: Recipe) -> str:
    run = _quoted(recipe)
    overrides = f"model.init_from={run} lora.language.r=16 train.output_dir={run}_lora"
    return f"flamingo-ft train {run}/{RECIPE_FILE} {overrides}"


def _quoted(recipe: Recipe) -> str:
    return shlex.quote(str(recipe.train.output_dir))


def held_out_trend(entries: Sequence[Entry]) -> Trend | None:
    """Return how the held-out loss went over the last quarter of the steps; None with few evaluations."""
    points = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    points = [(step, loss) for step, loss in points if step > 0 and math.isfinite(loss)]
    if len(points) < MIN_EVALUATIONS:
        return None
    end, last = points[-1]
    start, before = [point for point in points if point[0] <= 0.75 * end or point == points[0]][-1]
    lowest_step, lowest = min(points, key=lambda point: point[1])
    if last > (1 + CHANGE) * lowest:
        text = (
            f"the held-out loss was lowest at step {lowest_step:,} ({significant(lowest)}) and rose to "
            f"{significant(last)}"
        )
        return Trend("rising", text, last)
    text = (
        f"the held-out loss was still falling, from {significant(before)} at step {start:,} to "
        f"{significant(last)} at step {end:,}"
    )
    return Trend("falling" if last < (1 - CHANGE) * before else "flat", text, last)


def training_trend(entries: Sequence[Entry]) -> Trend | None:
    """Return how the training loss went: its last quarter beside the one before; None with few entries."""
    losses = np.array([entry["loss"] for entry in entries if math.isfinite(entry.get("loss", math.nan))])
    if len(losses) < MIN_ENTRIES:
        return None
    quarter = len(losses) // 4
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    error = math.sqrt((before.var(ddof=1) + last.var(ddof=1)) / quarter)
    fall = before.mean() - last.mean()
    text = (
        f"the training loss was still falling, from {significant(before.mean())} to "
        f"{significant(last.mean())} in the last quarter of the steps"
    )
    is_falling = fall > max(SIGNIFICANT * error, CHANGE * before.mean())
    return Trend("falling" if is_falling else "flat", text, float(last.mean()))
