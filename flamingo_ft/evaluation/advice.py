"""What to try next after a run whose answers are not right often enough, from what the run measured.

The curve of the loss or reward says whether more steps or more data would help; a probe, whether the tower is
the limit; and if neither is, the language model may have to adapt. Nothing is advised that the recipe has
already, or that its ``model.init_from`` excludes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flamingo_ft.config import RECIPE_FILE, Recipe
from flamingo_ft.formatting import percent, significant

from .image_use import MIN_QUESTIONS, REMEDY
from .metrics import ACCURACY
from .probe import Probe
from .probe_verdict import other_tower, tower_is_the_limit
from .questions import Question
from .reference_answers import by_task, is_free_text
from .results import AFTER, BEFORE, Results

GOOD = 0.9  # share of right answers from which on nothing is advised
CHANGE = 0.03  # relative change of the loss over the last quarter of the steps that counts
SIGNIFICANT = 2.0  # standard errors of the training loss
MIN_EVALUATIONS, MIN_ENTRIES = 4, 8  # of the held-out and of the training loss; fewer allow no conclusion
OVERFITTED = 1.3  # held-out loss relative to the training loss
MORE_ROWS = "more or more varied training rows"
METHODS = {"dpo": "DPO", "kto": "KTO", "grpo": "GRPO"}

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
    if len(results.questions) < MIN_QUESTIONS:
        return
    right, verdict = share_right(results), metrics["eval"].get("verdict") or ""
    if right >= GOOD:
        return
    lines = list(_of_reward(recipe, entries) if recipe.train.method == "grpo" else _of_loss(recipe, entries))
    if right < GOOD and recipe.train.method != "sft":
        lines.append(_of_start(recipe, results))
    if right < GOOD and REMEDY not in verdict:  # which says the rest; free text has no share
        lines += _of_model(recipe, results, entries, probe)
        if not lines and probe is None:
            lines = [f"the loss does not show what limits the answers: {_more_data(recipe)}"]
    if lines:
        metrics["eval"]["advice"] = lines


def share_right(results: Results, condition: str = AFTER) -> float:
    """Return the share of right answers; NaN if all of them are free text, whose exact match says little."""
    right, answers = [], results.texts(condition)
    for indices in by_task(results.questions).values():
        questions = [results.questions[index] for index in indices]
        if not is_free_text(questions):
            right += ACCURACY.measure(questions, [answers[index] for index in indices]).tolist()
    return sum(right) / len(right) if right else math.nan


def _of_loss(recipe: Recipe, entries: Sequence[Entry]) -> Iterator[str]:
    """Yield what the curves of the loss suggest: more steps, or more data."""
    held_out, training = held_out_trend(entries), training_trend(entries)
    trend = held_out or training
    if trend is None:
        return
    if trend.course == "falling":
        yield f"{trend.text}: {_longer(recipe)}"
    elif trend.course == "rising":
        keep = "" if recipe.eval.keep == "best" else "; eval.keep=best ends with the best adapter"
        yield f"{trend.text}: the model overfits; {_more_data(recipe)}, or fewer steps{keep}"
    elif held_out and training and held_out.last > OVERFITTED * training.last:
        yield (
            f"the loss no longer falls, and is {significant(training.last)} in training, "
            f"{significant(held_out.last)} on held-out samples: {_more_data(recipe)}"
        )


def _of_reward(recipe: Recipe, entries: Sequence[Entry]) -> Iterator[str]:
    """Yield whether more steps would help a run whose loss says little."""
    if (text := rising_reward(entries)) is not None:
        yield f"{text}: {_longer(recipe)}"


def _of_start(recipe: Recipe, results: Results) -> str:
    """Return that another method than SFT needs a model that can answer already."""
    method = f"{METHODS[recipe.train.method]} changes how often a model gives answers that it knows"
    if recipe.model.init_from is None:
        return f"{method}: train a bridge by train.method=sft first, and start from it with model.init_from"
    before = share_right(results, BEFORE) if BEFORE in results.answers else math.nan
    figure = "" if math.isnan(before) else f", and {percent(before)} were right before it"
    return f"{method}{figure}: improve the run of model.init_from first, by train.method=sft"


def _longer(recipe: Recipe) -> str:
    steps = recipe.train.max_steps
    return f"train longer, --resume with more train.epochs (or train.max_steps, now {steps})"


def _more_data(recipe: Recipe) -> str:
    """Return the remedy for few data; cached tokens of images exclude augmentation."""
    has_no_use = recipe.data.augmentation or recipe.data.cache
    return MORE_ROWS if has_no_use else f"{MORE_ROWS}, or data.augmentation"


def _of_model(
    recipe: Recipe, results: Results, entries: Sequence[Entry], probe: Probe | None
) -> Iterator[str]:
    """Yield what else may be the limit: the frozen language model, or the tower.

    A probe of tiled images does not show that it is the tower.
    """
    questions = results.questions
    trend = held_out_trend(entries) or training_trend(entries)
    is_flat = recipe.train.method == "sft" and trend is not None and trend.course == "flat"
    if is_flat and "language" not in recipe.lora.parts:
        yield (
            "the loss no longer falls, and the language model is frozen: train LoRA on it, from this run on: "
            f"{_lora_command(recipe)}"
        )
    if recipe.data.tiles is not None:
        return
    if probe is not None and tower_is_the_limit(probe, questions, results.texts(AFTER)):
        yield f"the model answers as well as a probe of its tower: {other_tower(recipe)}"
    elif probe is None and _can_be_probed(questions):
        yield (
            f"neither {_quoted(recipe)} nor a folder beside it has a probe of this tower and data: "
            f"flamingo-ft check {_quoted(recipe)}/{RECIPE_FILE} --probe shows whether the tower can tell the "
            f"answers apart; if it cannot, {other_tower(recipe)}"
        )


def _can_be_probed(questions: Sequence[Question]) -> bool:
    """Whether there are questions of which a low share in a probe shows that the tower is the limit."""
    probed = [question for question in questions if len(question.images) == 1 and not question.boxes]
    return bool(probed) and not is_free_text(probed)


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
    change = _last_change(entries, "loss")
    if change is None:
        return None
    text = (
        f"the training loss was still falling, from {significant(change.before)} to "
        f"{significant(change.last)} in the last quarter of the steps"
    )
    return Trend("falling" if change.before - change.last > change.noise else "flat", text, change.last)


def rising_reward(entries: Sequence[Entry]) -> str | None:
    """Return how the reward of sampled answers rose in the last quarter of the steps; None if it did not."""
    change = _last_change(entries, "reward")
    if change is None or change.last - change.before <= change.noise:
        return None
    return (
        f"the reward was still rising, from {significant(change.before)} to "
        f"{significant(change.last)} in the last quarter of the steps"
    )


@dataclass(frozen=True)
class _Change:
    """Means of a logged value in two quarters of the steps. noise: differences up to this may be chance."""

    before: float
    last: float
    noise: float


def _last_change(entries: Sequence[Entry], key: str) -> _Change | None:
    """Return the last quarter of a logged value beside the one before; None with few entries."""
    values = np.array([entry[key] for entry in entries if math.isfinite(entry.get(key, math.nan))])
    if len(values) < MIN_ENTRIES:
        return None
    quarter = len(values) // 4
    before, last = values[-2 * quarter : -quarter], values[-quarter:]
    error = math.sqrt((before.var(ddof=1) + last.var(ddof=1)) / quarter)
    noise = max(SIGNIFICANT * error, CHANGE * abs(before.mean()))
    return _Change(float(before.mean()), float(last.mean()), float(noise))
