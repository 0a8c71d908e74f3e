"""Variants of a model, asked the same questions: its base, quantized, merged, or another adapter.

    variants = find_variants("runs/mine", compared=["base", "nf4", "merged"])
    answers = [use_variant(variant, ask) for variant in variants]
    compare_variants(questions, answers, metrics)

Models are loaded one after the other, and each is released before the next.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from flamingo_ft.adapters.files import read_config
from flamingo_ft.adapters.load import refuse_requantizing
from flamingo_ft.adapters.switched_off import base_bridge, switched_off
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.names import hub_name, missing_path_message
from flamingo_ft.hub.weight_files import is_whole_model
from flamingo_ft.inference.predictor import FORMATS, Predictor

from .bootstrap import bootstrap_difference
from .image_use import REMEDY, image_use
from .metrics import Metric
from .questions import Question
from .results import AFTER, SHUFFLED, Answers
from .scores import Scores, interval_record, score_record

BASE = "base"
NAMES = (BASE, *FORMATS)
# Parts of the questions that are scored separately if there are both.
EVERY, WITH_IMAGES, TEXT_ONLY = "all", "with_images", "text_only"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Variant:
    """A model to ask.

    name: in tables and records. adapter_off: ask its base instead, see `switched_off`. start, quantization:
    see `Predictor.from_pretrained`.
    """

    name: str
    folder: Path
    quantization: str | None = None
    adapter_off: bool = False
    start: str | Path | None = None


@dataclass(frozen=True)
class VariantAnswers:
    """A variant's answers by condition, `AFTER` first, and how fast it gave those.

    quantization: that it was loaded with; None: as in training, or as it is stored.
    """

    name: str
    answers: Answers
    samples_per_second: float
    quantization: str | None = None


def find_variants(
    model: str | Path,
    quantization: str | None = None,
    compared: Sequence[str] = (),
    start: str | Path | None = None,
) -> list[Variant]:
    """Return the variants to ask, the model itself first.

    Args:
        quantization: of the model, its base and other models; see `Predictor.from_pretrained`.
        compared: `BASE` for the model without its adapter, a format (none, int8, nf4, fp4) for the model
            quantized so, or another adapter or merged model.
        start: of the model, its base and its formats; see `Predictor.from_pretrained`.

    Raises:
        UserError: a variant does not exist, is named twice, or cannot be loaded in this way.
    """
    first = Variant(str(model), fetch_model(model), quantization, start=start)
    variants = [first]
    for name in compared:
        variant = _find(name, first)
        same = next((one for one in variants if one.name == name or _key(one) == _key(variant)), None)
        if same is not None:
            problem = "is the evaluated model itself" if same is first else "is there twice"
            raise UserError(f"--compare: {name} {problem}; name another variant, or remove it")
        variants.append(variant)
    return variants


def _find(name: str, first: Variant) -> Variant:
    """Return the variant that ``name`` means beside the evaluated model."""
    if name == BASE:
        if is_whole_model(first.folder):
            raise UserError(
                f"--compare base: {first.name} is a whole model and has no adapter to switch off; "
                "evaluate its adapter, or name another variant"
            )
        return replace(first, name=name, adapter_off=True)
    if name in FORMATS:
        _check_loadable(first.folder, name)
        return replace(first, name=name, quantization=name)
    if hub_name(name) is None and not Path(name).expanduser().exists():
        remedy = f"use {', '.join(NAMES)}, or another adapter or merged model"
        raise UserError(f"--compare: {missing_path_message(name, 'folder', remedy=remedy)}")
    variant = Variant(name, fetch_model(name), first.quantization)
    _check_loadable(variant.folder, variant.quantization)
    return variant


def _check_loadable(folder: Path, quantization: str | None) -> None:
    """Raise UserError, before any model is loaded, for a folder without one, or stored in another format."""
    if is_whole_model(folder):
        refuse_requantizing(folder, quantization)
    else:
        read_config(folder)


def _key(variant: Variant) -> tuple[Path, str | None, bool]:
    return variant.folder.resolve(), variant.quantization, variant.adapter_off


def use_variant(variant: Variant, use: Callable[[Predictor], Answer], **options: Any) -> Answer:
    """Load a variant, return what ``use`` returns for it, and release its memory.

    options: of `Predictor.from_pretrained`.
    """
    try:
        return _use(variant, use, options)
    finally:
        gc.collect()  # a model and its hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _use(variant: Variant, use: Callable[[Predictor], Answer], options: Mapping[str, Any]) -> Answer:
    with ExitStack() as stack:
        predictor = Predictor.from_pretrained(
            variant.folder, start=variant.start, quantization=variant.quantization, **options
        )
        if variant.adapter_off:
            bridge = base_bridge(variant.folder, predictor.model, variant.start)
            stack.enter_context(switched_off(predictor.model, bridge))
        return use(predictor)


def compare_variants(
    questions: Sequence[Question], variants: Sequence[VariantAnswers], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Return a record for each variant.

    Each has the ``name``, the ``quantization`` that was chosen and ``samples_per_second``. ``scores`` is a
    list, of each metric on each part of the questions that it is defined on: ``samples``, ``boxes`` if some
    of them are scored by another metric because of their boxes, the keys of `score_record` and, except
    for the first variant, ``difference``, the value minus that of the first, paired by question. With answers
    to other images, ``verdict`` says whether the variant uses its images.
    """
    parts = parts_of(questions)
    measured = [Scores.of(metrics, questions, variant.answers, {}) for variant in variants]
    records = []
    for variant, scores in zip(variants, measured, strict=True):
        record: dict[str, Any] = {
            "name": variant.name,
            "quantization": variant.quantization,
            "samples_per_second": variant.samples_per_second,
        }
        reference = None if scores is measured[0] else measured[0]
        record["scores"] = [
            {"metric": metric.name, "questions": part, "samples": scores.count(metric, indices)}
            | _boxes(metric, questions, indices)
            | _score(metric, scores, reference, part, indices)
            for metric in metrics
            for part, indices in parts.items()
            if not metric.only or scores.count(metric, indices)
        ]
        if SHUFFLED in variant.answers:
            texts = {name: [str(answer) for answer in given] for name, given in variant.answers.items()}
            verdict = image_use(questions, texts[AFTER], texts[SHUFFLED]) or ""
            advice = "" if reference is None else f"; {REMEDY}"  # on training, which is for the first variant
            record["verdict"] = verdict.removesuffix(advice)
        records.append(record)
    return records


def parts_of(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Return the indices of the questions with images and of those without; one part if all are alike."""
    parts: dict[str, list[int]] = {WITH_IMAGES: [], TEXT_ONLY: []}
    for index, question in enumerate(questions):
        parts[WITH_IMAGES if question.images else TEXT_ONLY].append(index)
    return parts if all(parts.values()) else {EVERY: list(range(len(questions)))}


def _boxes(metric: Metric, questions: Sequence[Question], indices: Sequence[int]) -> dict[str, int]:
    boxes = sum(bool(questions[index].boxes) for index in indices)
    return {"boxes": boxes} if boxes and metric.of_boxes is not None else {}


def _score(
    metric: Metric, scores: Scores, reference: Scores | None, part: str, indices: Sequence[int]
) -> dict[str, Any]:
    """Return the score of one part of the questions; text-only ones have no images to exchange."""
    conditions = [AFTER] if part == TEXT_ONLY else list(scores.statistics[metric.name])
    statistics = {condition: scores.select(metric, condition, indices) for condition in conditions}
    record = score_record(metric, statistics)
    if reference is None:
        return record
    difference = bootstrap_difference(
        reference.select(metric, AFTER, indices), statistics[AFTER], metric.aggregate
    )
    return {**record, "difference": interval_record(difference)}
