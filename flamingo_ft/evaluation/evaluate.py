"""Evaluate an adapter or a merged model on disk, as `flamingo-ft eval` does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_ft import atomic
from flamingo_ft.adapters.trained_on import never_trained, read_record
from flamingo_ft.config import (
    RECIPE_FILE,
    RESULTS_FILE,
    DataSection,
    DataSource,
    EvalSection,
    Recipe,
    load_recipe,
)
from flamingo_ft.config.loading import parse_override
from flamingo_ft.config.metric_names import parse_metric
from flamingo_ft.data import OpenedData, Sample, open_data
from flamingo_ft.data.drawing import scaled
from flamingo_ft.data.read_like import read_like, recorded_sources
from flamingo_ft.data.schemas.boxes import BoxUnit
from flamingo_ft.data.schemas.schema import UnknownColumns
from flamingo_ft.data.sources.source import open_source
from flamingo_ft.errors import UserError
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.geometry import ImageGeometry
from flamingo_ft.progress import Bars, progress_bars

from .card import check_has_card, write_comparison
from .questions import Question, questions_of, with_gray_images, with_other_images
from .results import AFTER, BLANK, COLUMN_HEADERS, SHUFFLED, Results
from .results_page import RESULTS_PAGE, write_results_page
from .select_metrics import select_metrics
from .variant_tables import variant_tables, verdicts
from .variants import Variant, VariantAnswers, compare_variants, find_variants, use_variant

SAME_VIEW = 0.01  # of the image's side
_NO_RECIPE = Path(__file__).with_name("no_recipe.yaml")
_COLUMNS = "data.eval.0.columns='{image: COLUMN, question: COLUMN, answer: COLUMN}'"
_NO_TRAINING_DATA = 'data.train=[{"hub": "none/none"}]'  # it is not read, so it need not exist here
_USED_KEYS = (
    "data.eval",
    "data.allow_urls",
    "data.on_bad_sample",
    "eval.batch_size",
    "eval.max_new_tokens",
    "eval.max_samples",
    "eval.metrics",
)


def evaluate_adapter(
    adapter: str | Path,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
    metrics: Sequence[str] = (),
    *,
    image_root: Path | None = None,
    box_unit: BoxUnit = "pixels",
    start: str | Path | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    controls: bool = False,
    out: Path | None = None,
    compare: Sequence[str] = (),
    card: bool = False,
) -> dict[str, Any]:
    """Score an adapter or a merged model on held-out samples, by the metrics of its recipe.

    data: a file of samples, or a folder of images that training reads; by default the held-out samples of
    its recipe. overrides: ``key=value`` for the recipe's ``data.eval`` and ``eval`` sections; with ``data``,
    ``data.eval.0`` is that file. image_root, box_unit: where the images of ``data`` are, and the unit of its
    boxes. report: called with a line for each skipped sample. metrics: names of more metrics, or users'
    functions (``FILE.py:function``, relative to the current directory). start, quantization,
    dtype: see `Predictor.from_pretrained`. controls: ask again with the images of other samples and with gray
    ones. out: folder for results.json, predictions.jsonl and results.html. compare: variants to ask the same
    questions, see `find_variants`. card: write the scores of the variants into the card (README.md) of the
    adapter.

    Returns ``eval``, as in metrics.json, and ``variants``: the scores with their intervals, of the model
    first, then of what it is compared with (`compare_variants`). Raises UserError for keys that evaluation
    does not use, for metrics that cannot be computed, for variants that cannot be loaded, and if there are no
    held-out samples.
    """
    more = [parse_metric(name) for name in metrics]
    if card:
        check_has_card(adapter)
    variants = find_variants(adapter, quantization, compare, start)
    source_options = {
        "image_root": image_root and image_root.absolute(),
        "box_unit": None if box_unit == "pixels" else box_unit,
    }
    recipe = recipe_for_evaluation(adapter, variants[0].folder, data, overrides, source_options)
    opened = open_data(recipe.data, recipe.train.seed)
    samples = _with_boxes_written(opened.eval_samples(recipe.eval.max_samples), opened, variants)
    for reason in opened.skipped.values():
        report(f"skipped: {reason}")
    if not samples:
        raise UserError(f"{adapter}: no held-out samples; name some with --data FILE")
    questions = questions_of(samples)
    for line in _never_trained(variants[0].folder, questions):
        report(f"warning: {line}")
    selected = select_metrics(recipe.eval, questions, more)
    asked = {condition: questions_of(shown) for condition, shown in _conditions(samples, controls)}
    own, *others = answers = _ask_each(variants, asked, recipe.eval, dtype)
    results = Results(questions, dict(own.answers), selected)
    record = {"eval": results.summary(), "variants": compare_variants(questions, answers, selected)}
    if out is not None:
        write_results(out, str(adapter), results, record, others)
    if card:
        name = "held-out samples" if data is None else Path(data).name
        write_comparison(variants[0].folder, name, record["variants"])
    return record


def _never_trained(folder: Path, questions: Sequence[Question]) -> list[str]:
    """Return how questions are unlike all training samples, each way once."""
    record = read_record(folder)
    lines = (line for one in questions for line in never_trained(record, one.messages, len(one.images)))
    return [*dict.fromkeys(lines)]


def _with_boxes_written(
    samples: Sequence[Sample], opened: OpenedData, variants: Sequence[Variant]
) -> Sequence[Sample]:
    """Return the samples with their boxes as the first variant reads them.

    Raises UserError for another variant that sees other parts of the images.
    """
    if not any(sample.boxes for sample in samples):
        return samples
    first, *others = (
        opened.with_boxes_written(samples, FlamingoProcessor.from_pretrained(folder))
        for folder in dict.fromkeys(variant.folder for variant in variants)
    )
    if not all(_see_the_same(first, other) for other in others):
        raise UserError(
            "--compare: the variants see different parts of the images (resize mode or tiles), so that their "
            "boxes cannot be compared; evaluate them one by one"
        )
    return first


def _see_the_same(samples: Sequence[Sample], others: Sequence[Sample]) -> bool:
    """Whether two models see the same parts of the images, apart from rounding to their pixels."""
    ours, theirs = (
        [_view(geometry) for sample in part for geometry in sample.geometries if geometry]
        for part in (samples, others)
    )
    return np.shape(ours) == np.shape(theirs) and np.allclose(ours, theirs, atol=SAME_VIEW)


def _view(geometry: ImageGeometry) -> tuple[float, ...]:
    """Return the visible part as fractions of the original, and as fractions of what the model sees."""
    return *scaled(geometry.visible, geometry.original_size, (1, 1)), *geometry.to_view(geometry.visible)


def _conditions(samples: Sequence[Sample], controls: bool) -> Iterator[tuple[str, Sequence[Sample]]]:
    """Yield the samples as they are and, if asked for, with other and with gray images."""
    yield AFTER, samples
    if controls and any(sample.images for sample in samples):
        yield SHUFFLED, with_other_images(samples)
        yield BLANK, with_gray_images(samples)


def _ask_each(
    variants: Sequence[Variant], asked: Mapping[str, Sequence[Question]], config: EvalSection, dtype: str
) -> list[VariantAnswers]:
    """Ask the variants, one after the other, the questions of each condition."""
    with progress_bars(stderr=True) as progress:
        return [
            use_variant(variant, partial(_ask, variant, asked, config, progress), dtype=dtype)
            for variant in variants
        ]


def _ask(
    variant: Variant,
    asked: Mapping[str, Sequence[Question]],
    config: EvalSection,
    progress: Bars,
    predictor: Predictor,
) -> VariantAnswers:
    """Return the answers of the variant that is loaded. Its first answer takes longer, and is not timed."""
    predictor.answer(asked[AFTER][:1], max_new_tokens=1)
    answers, seconds = {}, {}
    for condition, questions in asked.items():
        title = variant.name if condition == AFTER else f"{variant.name}, {COLUMN_HEADERS[condition]}"
        bar = progress.add_task(title, total=len(questions), note="")
        start = time.perf_counter()
        answers[condition] = predictor.answer(
            questions,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            on_batch=partial(progress.advance, bar),
        )
        seconds[condition] = time.perf_counter() - start
        progress.finish(bar)
    speed = len(asked[AFTER]) / seconds[AFTER]
    return VariantAnswers(variant.name, answers, speed, variant.quantization)


def write_results(
    out: Path,
    title: str,
    results: Results,
    record: Mapping[str, Any],
    others: Sequence[VariantAnswers] = (),
) -> None:
    """Write an evaluation to a folder: its record, every answer, and a page to look at them.

    others: the answers of further variants.
    """
    out.mkdir(parents=True, exist_ok=True)
    results.save(out, {variant.name: variant.answers for variant in others})
    write_results_page(
        out / RESULTS_PAGE,
        title,
        verdicts(record["variants"]),
        results.questions,
        results.answers,
        results.metrics,
        tables=variant_tables(record["variants"]),
        variants={variant.name: variant.answers[AFTER] for variant in others},
    )
    atomic.write_text(out / RESULTS_FILE, json.dumps(record, indent=2) + "\n")


def recipe_for_evaluation(
    adapter: str | Path,
    folder: Path,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    source_options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe beside an adapter with ``data`` and ``overrides`` applied.

    source_options: keys to set in the source that ``data`` becomes; None keeps a key's value.
    Converted adapters and merged models may have no recipe; they are evaluated with default settings.
    """
    for override in overrides:
        _check_used(override)
    file = folder / RECIPE_FILE
    if not file.is_file():
        file = _NO_RECIPE
        _check_model(adapter, folder, has_samples=data is not None or any(map(_sets_samples, overrides)))
    if data is None:
        values = [*overrides]
    else:
        named = any(parse_override(override).location[:2] == ("data", "eval") for override in overrides)
        values = [*_data_overrides(Path(data), file, source_options or {}, named), *overrides]
    if any(parse_override(override).location == ("eval", "metrics") for override in overrides):
        values.append("eval.metric=loss")  # otherwise the metric that selected would be computed as well
    if load_recipe(file, values, require=()).data.eval_fraction is not None:
        return load_recipe(file, values, require=("data",))
    recipe = load_recipe(file, [_NO_TRAINING_DATA, *values], require=("data",))
    sources = recipe.data.eval
    if not sources:
        raise UserError(f"{adapter}: data.eval is empty; name samples with --data FILE")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": sources})})


def _data_overrides(data: Path, recipe: Path, more: Mapping[str, Any], named: bool) -> list[str]:
    """Make ``data`` the only source of held-out samples, read as the recipe's own, and use all of it.

    named: further overrides set keys of the source, such as the names of its columns.
    """
    known = recorded_sources(recipe)
    try:
        source = read_like(data, known, lambda one: open_source(one, DataSection(train=(one,))))
    except UnknownColumns as error:
        if not named:
            raise UserError(f"{error}, or name them: {_COLUMNS}") from None
        source = DataSource(path=data.absolute())
    source = source.model_copy(update={key: value for key, value in more.items() if value is not None})
    sources = json.dumps([source.model_dump(mode="json", exclude_defaults=True)], ensure_ascii=False)
    return [f"data.eval={sources}", "data.eval_fraction=null", "eval.max_samples=null"]


def _sets_samples(override: str) -> bool:
    return parse_override(override).location == ("data", "eval")


def _check_used(override: str) -> None:
    location = parse_override(override).location
    used_keys = [tuple(key.split(".")) for key in _USED_KEYS]
    if not any(location[: len(used)] == used for used in used_keys):
        key = ".".join(map(str, location))
        raise UserError(f"override {key}: evaluation does not use it; it uses {', '.join(_USED_KEYS)}")


def _check_model(adapter: str | Path, folder: Path, has_samples: bool) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{adapter}: not an adapter or a merged model; give the folder that a run or a conversion wrote"
        )
    if not has_samples:
        raise UserError(
            f"{adapter}: has no {RECIPE_FILE}, so no held-out samples; name some with --data FILE"
        )
