"""Check a recipe's data: read and decode every row, summarize it, and write the report.

The report is a folder with check.html, check.json, problems.jsonl and three histograms; with a probe of the
vision tower, also probe.json.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flamingo_ft import atomic
from flamingo_ft.config import Recipe, method_warnings
from flamingo_ft.data import OpenedData, open_data
from flamingo_ft.data.opened_data import (
    check_method,
    limit_of_questions,
    samples_per_epoch,
    steps_per_epoch,
    with_max_steps,
)
from flamingo_ft.data.render import apply_template
from flamingo_ft.data.sample_order import WeightedSource
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.probe import run_probe
from flamingo_ft.evaluation.probe_verdict import tower_lines
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.build import backbone_files, eos_token_ids, set_media_options, tagged_tiles, text_limit
from flamingo_ft.progress import progress_bars

from .check_report import MADE_BY, CheckReport, TrainingLength
from .report_builder import ProblemLog, ReportBuilder
from .report_page import preview_samples, save_histograms, write_page
from .row_inspector import RowInspector, inspect_rows
from .text_checks import TextInspector, dialogue_format

PROBLEMS_FILE = "problems.jsonl"
RECORD_FILE = "check.json"


def check_data(
    recipe: Recipe,
    name: str,
    folder: Path,
    probe: bool = False,
    stages: Mapping[str, Recipe] | None = None,
) -> CheckReport:
    """Read every row of the recipe's data, write the report to ``folder`` and return it.

    Reads the backbones' configuration and tokenizer, but no weights except, for a probe, the tower's.

    Args:
        name: the recipe's name, for the title of the report.
        probe: measure whether the vision tower can tell the answers apart (`evaluation.probe`), unless the
            data are unusable.
        stages: the runs, by name, whose data the recipe has; the last one's are probed.

    Raises:
        UserError: a data source cannot be opened or does not suit a method that compares answers, a backbone
            does not exist, or ``folder`` holds other files.
    """
    with _report_folder(folder) as new:
        files = backbone_files(recipe.model)
        processor = files.processor(tagged_tiles(recipe.data))
        apply_template(processor, recipe.data)
        set_media_options(processor, recipe.data)
        limit = text_limit(files.language, recipe.data.max_text_tokens)
        trained, held_out = _text_inspectors(processor, recipe, limit)
        data = open_data(recipe.data, recipe.train.seed)
        sources = [*data.train, *data.eval]
        inspectors = [trained] * len(data.train) + [held_out] * len(data.eval)
        if recipe.train.method != "sft":
            check_method(data.train, recipe.train.method)
        images, problems = processor.image_processor, ProblemLog(new / PROBLEMS_FILE)
        builder = ReportBuilder(data, recipe.eval, trained.limit, problems, images)
        _inspect_all(sources, inspectors, builder, recipe.train.num_workers)
        text_form = dialogue_format(processor, eos_token_ids(recipe.model))
        report = builder.build(name, _training_lengths(recipe, data, stages or {}), text_form)
        report = replace(report, method_warnings=[*method_warnings(recipe)])
        if probe and report.objection is None:
            probed = [*stages.values()][-1] if stages else recipe
            report = _with_probe(report, probed, open_data(probed.data, probed.train.seed), new)
        (new / RECORD_FILE).write_text(json.dumps(report.record(), indent=2) + "\n", encoding="utf-8")
        previews = [
            preview_samples(index, source, inspector)
            for index, (source, inspector) in enumerate(zip(sources, inspectors, strict=True))
        ]
        write_page(new, report, builder.problems, previews, save_histograms(report, new))
    return report


def _text_inspectors(
    processor: FlamingoProcessor, recipe: Recipe, limit: int
) -> tuple[TextInspector, TextInspector]:
    """Return the inspectors of training and of held-out rows; with grpo, the latter are encoded as in sft."""
    method = recipe.train.method
    if method != "grpo":
        both = TextInspector(processor, recipe.data, limit, method)
        return both, both
    questions = TextInspector(processor, recipe.data, limit_of_questions(recipe, limit), method)
    return questions, TextInspector(processor, recipe.data, limit)


def _with_probe(report: CheckReport, recipe: Recipe, data: OpenedData, folder: Path) -> CheckReport:
    """Return the report with a probe of the recipe's tower, which is also written to ``folder``."""
    try:
        probe = run_probe(recipe, data)
    except UserError as error:
        return replace(report, probe_error=str(error))
    probe.save(folder)
    return replace(report, probe=probe.record(), probe_lines=list(tower_lines(probe)))


def _training_lengths(
    recipe: Recipe, data: OpenedData, stages: Mapping[str, Recipe]
) -> dict[str, TrainingLength]:
    """Return the length of each stage by name, or of the whole run under an empty name."""
    if not stages:
        return {"": _training_length(recipe, data)}
    return {name: _training_length(run, open_data(run.data, run.train.seed)) for name, run in stages.items()}


def _training_length(recipe: Recipe, data: OpenedData) -> TrainingLength:
    per_epoch, steps = steps_per_epoch(recipe, data), with_max_steps(recipe, data).train.max_steps
    assert steps is not None
    epochs = None if per_epoch is None else float(steps / per_epoch)
    return TrainingLength(steps, epochs, samples_per_epoch(recipe, data), recipe.data.packing)


def _inspect_all(
    sources: Sequence[WeightedSource],
    text_inspectors: Sequence[TextInspector],
    builder: ReportBuilder,
    workers: int,
) -> None:
    """Inspect every row of every source, with a progress bar on stderr."""
    row_sources = [weighted.source for weighted in sources]
    inspector = RowInspector(row_sources, text_inspectors)
    indexed = all(source.indexed for source in row_sources)
    total = sum(weighted.size for weighted in sources) if indexed else None
    with progress_bars(stderr=True) as progress:
        bar = progress.add_task("checking", total=total, note="")
        for result in inspect_rows(sources, inspector, workers):
            builder.add(result)
            count = builder.problems.count
            progress.update(bar, advance=1, note=f"problems: {count:,}" if count else "")


@contextmanager
def _report_folder(folder: Path) -> Generator[Path]:
    """Yield a temporary folder and move its files to ``folder`` if the block succeeds.

    Raises UserError if ``folder`` is a file, or holds files but no earlier check.
    """
    _refuse_other_files(folder)
    # check.json marks the folder as a check. It moves first, so that the next check can replace what an
    # interrupted move left.
    with atomic.files_in_place(folder, first=RECORD_FILE) as new:
        yield new


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder: --out FOLDER")
    if folder.is_dir() and any(folder.iterdir()) and not _is_check_folder(folder):
        raise UserError(f"{folder}: holds files but no earlier check; choose another folder: --out FOLDER")


def _is_check_folder(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("made_by") == MADE_BY
