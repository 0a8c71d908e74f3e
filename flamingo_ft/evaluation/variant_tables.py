"""Variants compared on the same questions, as tables of text: for the terminal, results.html and the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flamingo_ft.adapters.card import TextTable
from flamingo_ft.formatting import plural, significant

from .metrics import Metric, capitalized, find_metrics
from .results import label_of_condition
from .variants import EVERY, TEXT_ONLY, WITH_IMAGES

QUESTIONS = {EVERY: "", WITH_IMAGES: " with images", TEXT_ONLY: " without images"}


def variant_tables(variants: Sequence[Mapping[str, Any]]) -> list[TextTable]:
    """Return a table for each metric and each part of the questions, with a row for each variant.

    variants: records of `compare_variants`.
    """
    return [_table(variants, place) for place in range(len(variants[0]["scores"]) if variants else 0)]


def _table(variants: Sequence[Mapping[str, Any]], place: int) -> TextTable:
    """Return the table of one entry of ``scores``."""
    scores = [variant["scores"][place] for variant in variants]
    (metric,) = find_metrics([scores[0]["metric"]])
    controls = list(scores[0].get("controls", ()))
    headers = [label_of_condition(control) for control in controls]
    columns = ["model", "score", *(["difference"] if len(variants) > 1 else []), *headers, "samples/s"]
    rows = []
    for variant, score in zip(variants, scores, strict=True):
        differences = [_difference(metric, score)] if len(variants) > 1 else []
        values = [metric.text(score["controls"][control]["value"]) for control in controls]
        speed = significant(variant["samples_per_second"])
        rows.append([label_of(variant), _score(metric, score), *differences, *values, speed])
    part = f" {metric.only}" if metric.only else QUESTIONS[scores[0]["questions"]]
    questions = plural(scores[0]["samples"], "question") + part
    label = capitalized(metric.label_with(scores[0].get("boxes", 0)))
    return TextTable(f"{label}, {questions}", columns, rows)


def label_of(variant: Mapping[str, Any]) -> str:
    """Return the name of a variant, and the format that it was loaded in if that was chosen."""
    name, quantization = variant["name"], variant["quantization"]
    return name if quantization in (None, name) else f"{name} in {quantization}"


def _score(metric: Metric, score: Mapping[str, Any]) -> str:
    """Return ``98.1 % (96.9 to 99.2)``."""
    return _with_interval(score, metric.text, lambda value: _number(metric, value))


def _difference(metric: Metric, score: Mapping[str, Any]) -> str:
    """Return ``-1.2 (-2.0 to +0.3)``; empty for the first variant."""
    if "difference" not in score:
        return ""

    def signed(value: float) -> str:
        return ("+" if value > 0 else "-" if value < 0 else "") + _number(metric, abs(value))

    return _with_interval(score["difference"], signed, signed)


def _number(metric: Metric, value: float) -> str:
    return metric.text(value).removesuffix(" %")


def _with_interval(
    interval: Mapping[str, Any], text: Callable[[float], str], end: Callable[[float], str]
) -> str:
    if interval["value"] is None or interval["low"] is None:
        return "not defined"
    return f"{text(interval['value'])} ({end(interval['low'])} to {end(interval['high'])})"


def verdicts(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is known of the variants' use of images, a line each."""
    judged = [variant for variant in variants if variant.get("verdict")]
    if len(variants) == 1:
        return [variant["verdict"] for variant in judged]
    return [f"{label_of(variant)}: {variant['verdict']}" for variant in judged]
