"""A whole run: recipe -> model -> training -> adapter -> evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flamingo_ft.adapters import save_adapter, trainable_parameters
from flamingo_ft.config import RECIPE_FILE, Recipe, dump_recipe
from flamingo_ft.data import Sample, read_samples
from flamingo_ft.evaluation.accuracy import evaluate
from flamingo_ft.evaluation.questions import questions_of, with_other_images
from flamingo_ft.evaluation.run import read_eval_samples, summarise
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .build import build_model
from .callbacks import KeepAdapter, ProgressBar, StopOnNonFiniteLoss, progress_bars
from .output_dir import prepare_output_dir
from .trainer import adapter_folder, make_trainer

METRICS_FILE = "metrics.json"
LOG_FILE = "log.jsonl"


def train(recipe: Recipe, recipe_path: Path | None = None) -> dict[str, Any]:
    """Train as the recipe says, save the adapter in its output directory, and evaluate it.

    Returns what is written to ``metrics.json``. Raises UserError for data, backbones or an output directory that will
    not do; those are checked before anything is written.
    """
    prepare_output_dir(recipe.train.output_dir)
    sources = [read_samples(source.path, source.image_root) for source in recipe.data.train]
    held_out = read_eval_samples(recipe)
    model, processor = build_model(recipe)
    (recipe.train.output_dir / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    with progress_bars() as progress:
        accuracies = _Accuracies(model, processor, held_out, recipe, progress)
        if recipe.eval.before:
            accuracies.measure("before", held_out)
        training = _train(model, processor, sources, recipe, progress)
        save_adapter(model, processor, recipe.train.output_dir)
        accuracies.measure("after", held_out)
        if recipe.eval.shuffled_images:
            accuracies.measure("shuffled_images", with_other_images(held_out, recipe.train.seed))
    metrics = {"eval": summarise(**accuracies.found), "train": training} if held_out else {"train": training}
    _write_json(recipe.train.output_dir / METRICS_FILE, metrics)
    return metrics


class _Accuracies:
    """Evaluations of one model on the way, each under its name."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        held_out: Sequence[Sample],
        recipe: Recipe,
        progress: Progress,
    ):
        self.found: dict[str, dict] = {}
        self._evaluate = partial(evaluate, model, processor)
        self._options = {"batch_size": recipe.eval.batch_size, "max_new_tokens": recipe.eval.max_new_tokens}
        self._progress = progress

    def measure(self, name: str, samples: Sequence[Sample]) -> None:
        if not samples:
            return
        description = f"evaluating ({name.replace('_', ' ')})"
        bar = self._progress.add_task(description, total=len(questions_of(samples)), note="")
        self.found[name] = self._evaluate(samples, advance=partial(self._progress.advance, bar), **self._options)


def _train(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    sources: Sequence[Sequence[Sample]],
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Any]:
    """Run the trainer; what ``metrics.json`` says of it."""
    output_dir = recipe.train.output_dir
    callbacks = [ProgressBar(progress), StopOnNonFiniteLoss()]
    if recipe.train.save_steps:
        callbacks.append(KeepAdapter(processor, recipe.train.save_steps, partial(adapter_folder, output_dir)))
    trainer = make_trainer(model, processor, sources, recipe, callbacks)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    _write_log(output_dir / LOG_FILE, trainer.state.log_history)
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    return {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "trainable_parameters": parameters}


def _write_log(path: Path, history: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
