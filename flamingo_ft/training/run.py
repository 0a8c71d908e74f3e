"""A whole run: recipe -> model -> training -> adapter -> evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flamingo_ft.adapters import save_adapter, trainable_parameters, write_card
from flamingo_ft.config import RECIPE_FILE, Recipe, dump_recipe
from flamingo_ft.data import OpenedData, Sample, open_data
from flamingo_ft.errors import OutOfMemory
from flamingo_ft.evaluation.questions import as_row, questions_of, with_other_images
from flamingo_ft.evaluation.results import AFTER
from flamingo_ft.inference.answer import encode_prompts
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .best import evaluation_callbacks, take_best
from .build import build_model
from .callbacks import KeepAdapter, ProgressBar, progress_bars
from .examination import Examination
from .held_out import HeldOut
from .non_finite import SKIPPED, skipped_steps
from .optimizer import check_machine
from .out_of_memory import told_if_full, with_plan
from .output_dir import prepare_output_dir
from .precision import check_precision
from .trainer import adapter_folder, first_batches, make_trainer

METRICS_FILE = "metrics.json"
LOG_FILE = "log.jsonl"
LEFT_OUT_FILE = "left_out.jsonl"


def train(recipe: Recipe, tell: Callable[[OpenedData], None] = lambda data: None) -> dict[str, Any]:
    """Train as the recipe says, save the adapter in its output directory, and evaluate it.

    tell: hears of the data once it is open. Returns what is written to ``metrics.json``. Raises UserError for data,
    backbones or an output directory that will not do, before training, and OutOfMemory, a UserError with a plan.
    """
    try:
        return _whole_run(recipe, tell)
    except OutOfMemory as error:
        failed = error
    raise with_plan(failed, recipe)


def _whole_run(recipe: Recipe, tell: Callable[[OpenedData], None]) -> dict[str, Any]:
    check_machine(recipe.train)
    check_precision(recipe)
    output_dir = recipe.train.output_dir
    prepare_output_dir(output_dir)
    data = open_data(recipe.data, recipe.train.seed)
    tell(data)
    data.look_through()
    held_out = data.held_out_samples(recipe.eval.max_samples)
    with told_if_full("loading"):
        model, processor = build_model(recipe, partial(first_batches, data, recipe))
    encode_prompts(model, processor, [as_row(question) for question in questions_of(held_out)])  # refuses too long ones
    with progress_bars() as progress:
        examination = Examination(model, processor, held_out, recipe, progress)
        if recipe.eval.before:
            examination.take("before", held_out)
        training = _train(model, processor, data, recipe, progress, examination, held_out)
        save_adapter(model, processor, output_dir)
        examination.take(AFTER, held_out)
        if recipe.eval.shuffled_images:
            examination.take("shuffled_images", with_other_images(held_out, recipe.train.seed))
        progress.refresh()  # notebooks would show the last bar as it was a moment before
    examination.results.save(output_dir)
    metrics = {"eval": examination.results.summary()} if held_out else {}
    metrics["train"] = training
    write_card(model, output_dir, metrics.get("eval"))
    (output_dir / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _train(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    data: OpenedData,
    recipe: Recipe,
    progress: Progress,
    examination: Examination,
    held_out: Sequence[Sample],
) -> dict[str, Any]:
    """Run the trainer; what ``metrics.json`` says of it."""
    output_dir = recipe.train.output_dir
    callbacks = [ProgressBar(progress), *evaluation_callbacks(recipe, processor)]
    if recipe.train.save_steps:
        callbacks.append(KeepAdapter(processor, recipe.train.save_steps, partial(adapter_folder, output_dir)))
    trainer = make_trainer(model, processor, data, recipe, callbacks)
    if recipe.eval.steps:
        ranks = (trainer.args.process_index, trainer.args.world_size)
        trainer.held_out = HeldOut(held_out, model, processor, recipe, *ranks)
        trainer.share_right = examination.share_right if recipe.eval.answers else None
    (output_dir / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    began = time.monotonic()
    try:
        with told_if_full("training"):
            trainer.train()
    finally:
        _list_left_out(data.left_out | trainer.batches.tally.left_out, output_dir)
    seconds = time.monotonic() - began
    lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
    (output_dir / LOG_FILE).write_text("".join(lines), encoding="utf-8")
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    record = {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "trainable_parameters": parameters}
    skipped = skipped_steps(trainer.state.log_history)
    record |= {SKIPPED: skipped} if skipped else {}
    record |= take_best(trainer, recipe)
    counts = trainer.batches.tally.record()
    return record | {"data": counts | ({"held_out_skipped": len(data.left_out)} if data.left_out else {})}


def _list_left_out(reasons: Mapping[str, str], output_dir: Path) -> None:
    """Where each row is that was not used, and why; a run that too many of them end has the list too."""
    if reasons:
        lines = [json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in reasons.items()]
        (output_dir / LEFT_OUT_FILE).write_text("".join(lines), encoding="utf-8")
