"""What a probe says: of a tower by itself, and of a trained model beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flamingo_ft.config import Recipe
from flamingo_ft.formatting import percent, plural, shorten

from .image_use import REMEDY
from .metrics import exact_match, normalize
from .probe import MIN_GAIN, Probe, ProbeResult
from .probe_questions import MIN_SAMPLES_PER_ANSWER, question_key
from .questions import Question
from .results import AFTER, Results

QUESTION_CHARACTERS = 60
BLIND = "the tower cannot tell these answers apart"
OTHER_TOWER = "choose another tower, a larger model.vision.image_size, or data.tiles"
# Of which questions a low share leaves open whether the tower or the probe is the limit.
SEVERAL = "about several images, which a probe cannot compare"
HARDLY_REPEATS = f"with fewer than {MIN_SAMPLES_PER_ANSWER} training samples per answer, too few for a probe"
TILED = "about tiled images, whose views a probe averages"
LEARN_FASTER = "train longer or raise train.learning_rates.gates"


def tower_lines(probe: Probe) -> Iterator[str]:
    """Yield what the probe says of the tower: what it can tell, and what it cannot."""
    separable = [result for result in probe.questions if result.tells_apart]
    if separable:
        share, majority = _mean(separable, "best"), _mean(separable, "majority")
        part = _part(separable, probe.questions)
        yield (
            f"the tower can tell {percent(share)} of the held-out answers{part} "
            f"(majority share {percent(majority)})"
        )
    if blind := _blind(probe, probe.questions):
        yield f"{_blind_text(blind)}: {OTHER_TOWER}"
    for reason in (SEVERAL, HARDLY_REPEATS, TILED):
        if names := [_name(result) for result in probe.questions if _unclear(probe, result) == reason]:
            yield f"no conclusion from questions {reason}: {', '.join(names)}"


def compare_with_tower(
    probe: Probe, questions: Sequence[Question], predictions: Sequence[str], remedy: str = OTHER_TOWER
) -> str | None:
    """Return in a sentence how much of what its tower can tell the model uses; None without common questions.

    Only the held-out samples of probed questions count, those with answers that occur in training.
    remedy: what to do about a tower that cannot tell answers apart.
    """
    both = _with_model_shares(probe, questions, predictions)
    blind = _blind(probe, [result for result, _ in both])
    parts = []
    if shares := _shares(both):
        tower, used = shares
        part = _part([result for result, _ in both if result.tells_apart], [result for result, _ in both])
        tower_share = f"{percent(tower)} of the answers{part}" if part else percent(tower)
        figures = f"the tower can tell {tower_share}, the model uses {percent(used)}"
        parts.append(f"{figures}: {LEARN_FASTER}" if tower - used > MIN_GAIN else figures)
    if blind:
        parts.append(f"{_blind_text(blind)}: {remedy}")
    return "; ".join(parts) or None


def tower_is_the_limit(probe: Probe, questions: Sequence[Question], predictions: Sequence[str]) -> bool:
    """Whether the model uses all that its tower can tell."""
    shares = _shares(_with_model_shares(probe, questions, predictions))
    return shares is not None and shares[0] - shares[1] <= MIN_GAIN


def other_tower(recipe: Recipe) -> str:
    """Return what shows the model more; a bridge is tied to the tower that it was trained with."""
    if recipe.model.init_from is None:
        return OTHER_TOWER
    return (
        "set data.tiles, or train without model.init_from and with another tower or model.vision.image_size"
    )


def _with_model_shares(
    probe: Probe, questions: Sequence[Question], predictions: Sequence[str]
) -> list[tuple[ProbeResult, float]]:
    """Return the probed questions that the model was asked, each with the model's accuracy."""
    shares = [(result, _model_share(result, questions, predictions)) for result in probe.questions]
    return [(result, share) for result, share in shares if share is not None]


def _shares(both: Sequence[tuple[ProbeResult, float]]) -> tuple[float, float] | None:
    """Return the mean accuracy of the best classifiers and of the model, over the questions that a probe
    answers better than the majority baseline; None without any."""
    separable = [(result, share) for result, share in both if result.tells_apart]
    if not separable:
        return None
    samples = sum(result.eval_samples for result, _ in separable)
    used = sum(share * result.eval_samples for result, share in separable) / samples
    return _mean([result for result, _ in separable], "best"), used


def add_to_verdict(metrics: dict[str, Any], recipe: Recipe, results: Results, probe: Probe | None) -> None:
    """Extend the verdict in the ``eval`` record of a metrics.json by what the probe adds, if there is one.

    The general remedy gives way to the probe's.
    """
    if probe is None or "eval" not in metrics:
        return
    sentence = compare_with_tower(probe, results.questions, results.texts(AFTER), other_tower(recipe))
    if sentence is not None:
        verdict = metrics["eval"].get("verdict")
        parts = [] if verdict is None else [verdict.removesuffix(f"; {REMEDY}")]
        metrics["eval"]["verdict"] = "; ".join([*parts, sentence])


def _model_share(
    result: ProbeResult, questions: Sequence[Question], predictions: Sequence[str]
) -> float | None:
    """Return the model's accuracy on the held-out samples of a probed question; None without any."""
    wordings = {(result.task, text, result.images) for text in result.wordings}
    scores = [
        exact_match(prediction, question.references)
        for question, prediction in zip(questions, predictions, strict=True)
        if question_key(question) in wordings and normalize(question.answer) in result.answers
    ]
    return sum(scores) / len(scores) if scores else None


def _blind(probe: Probe, results: Sequence[ProbeResult]) -> list[ProbeResult]:
    """Return the questions that the tower cannot answer."""
    return [result for result in results if not result.tells_apart and _unclear(probe, result) is None]


def _unclear(probe: Probe, result: ProbeResult) -> str | None:
    """Return why a low share of a question says nothing about the tower; None if it does, or if it is high.

    Several images may have to be compared, an answer may be written nowhere else, and it may be in one of
    several tiles: these classifiers cannot learn that in general.
    """
    if result.tells_apart:
        return None
    if result.images > 1:
        return SEVERAL
    if result.hardly_repeats:
        return HARDLY_REPEATS
    return TILED if probe.tiled else None


def _part(results: Sequence[ProbeResult], among: Sequence[ProbeResult]) -> str:
    """Return which part of the probed questions a share is of; empty if it is of all."""
    return "" if len(results) == len(among) else f" to {len(results)} of {plural(len(among), 'question')}"


def _blind_text(blind: Sequence[ProbeResult]) -> str:
    figures = ", ".join(
        f"{_name(result)} {percent(result.best)}, majority share {percent(result.majority)}"
        for result in blind
    )
    return f"{BLIND} ({figures})"


def _name(result: ProbeResult) -> str:
    return f"{shorten(result.question, QUESTION_CHARACTERS)!r}"


def _mean(results: Sequence[ProbeResult], name: str) -> float:
    """Return the mean of a share over the held-out samples of several questions."""
    samples = sum(result.eval_samples for result in results)
    return sum(getattr(result, name) * result.eval_samples for result in results) / samples
