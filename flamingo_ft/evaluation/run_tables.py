"""Tables of a run beside its scores: held-out losses with and without images, held-out pairs, and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.adapters.card import TextTable
from flamingo_ft.formatting import duration, percent

from .loss_by_kind import KIND_LABELS, TEXT_ONLY, WITH_IMAGES
from .metrics import metrics_in
from .results import AFTER, BEFORE, COLUMN_HEADERS, overall_key

TRAINED = "trained"  # a header
LOSS_TITLE = "Held-out loss, nats per label token"
PAIRS_TITLE = "Held-out pairs: reward of the chosen and of the rejected answer"
PAIRS_HEADERS = ["pairs", "chosen answer has the larger reward", "mean difference"]
STAGES_TITLE = "Stages, and held-out scores after each"
LOSS_HEADERS = {TEXT_ONLY: "text-only loss", WITH_IMAGES: "loss with images"}


def run_tables(metrics: Mapping[str, Any]) -> list[TextTable]:
    """Return the tables that a metrics.json has values for, as text."""
    evaluation, stages = metrics.get("eval") or {}, metrics.get("stages") or ()
    tables = []
    if evaluation.get("loss_by_kind"):
        tables.append(_loss_table(evaluation["loss_by_kind"]))
    if evaluation.get("pairs"):
        tables.append(_pairs_table(evaluation["pairs"]))
    if stages:
        tables.append(_stage_table(evaluation, stages))
    return tables


def _loss_table(record: Mapping[str, Mapping[str, float]]) -> TextTable:
    conditions = [name for name in (BEFORE, AFTER) if any(name in losses for losses in record.values())]
    rows = [
        [KIND_LABELS[kind], f"{losses['samples']:,}", *(_loss(losses.get(name)) for name in conditions)]
        for kind, losses in record.items()
    ]
    return TextTable(LOSS_TITLE, ["rows", "samples", *(COLUMN_HEADERS[name] for name in conditions)], rows)


def _pairs_table(record: Mapping[str, float]) -> TextTable:
    ranked, margin = percent(record["ranked_correctly"]), f"{record['reward_margin']:+.3g}"
    return TextTable(PAIRS_TITLE, PAIRS_HEADERS, [[f"{record['samples']:,}", ranked, margin]])


def _stage_table(evaluation: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return a table with a row for each stage, below one for the scores before the first."""
    metrics = metrics_in(evaluation)[:1] if evaluation else []  # the tables of scores have the others
    kinds = [*(evaluation.get("loss_by_kind") or {})]

    def scores(record: Mapping[str, Any], condition: str) -> list[str]:
        losses = record.get("loss_by_kind") or {}
        values = [metric.text(record.get(overall_key(metric, condition))) for metric in metrics]
        return values + [_loss(losses.get(kind, {}).get(condition)) for kind in kinds]

    headers = ["stage", TRAINED, "steps", "time", *(metric.label for metric in metrics)]
    first = scores(evaluation, BEFORE)
    rows = [["before", "", "", "", *first]] if any(first) else []
    for number, stage in enumerate(stages, start=1):
        training = stage["train"]
        length = [f"{training['steps']:,}", duration(training["seconds"])]
        own = scores(stage.get("eval") or {}, AFTER)
        rows.append([f"{number}. {stage['name']}", ", ".join(stage["trained"]), *length, *own])
    return TextTable(STAGES_TITLE, [*headers, *(LOSS_HEADERS[kind] for kind in kinds)], rows)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
