"""A whole run: recipe -> model -> training -> adapter -> evaluation -> ``metrics.json``."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from flamingo_ft import atomic, processes
from flamingo_ft.adapters import check_start, save_adapter, trainable_parameters, write_card
from flamingo_ft.config import METRICS_FILE, RECIPE_FILE, Recipe, dump_recipe, method_warnings
from flamingo_ft.data import OpenedData, Sample, open_data
from flamingo_ft.data.examples import total_metrics
from flamingo_ft.data.opened_data import check_method, samples_per_epoch, with_max_steps
from flamingo_ft.errors import OutOfMemory, ReportedElsewhere, StoppedBySignal, UserError
from flamingo_ft.evaluation.advice import add_advice
from flamingo_ft.evaluation.probe import find_probe
from flamingo_ft.evaluation.probe_verdict import add_to_verdict
from flamingo_ft.evaluation.questions import questions_of, with_other_images
from flamingo_ft.evaluation.results import AFTER, BEFORE, SHUFFLED, Results, card_tables
from flamingo_ft.evaluation.run_tables import run_tables
from flamingo_ft.evaluation.select_metrics import known_metrics, select_metrics
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.progress import Bars, progress_bars
from flamingo_ft.report import LiveReport, final_report
from flamingo_ft.report.run_folder import LogFile, write_log

from .automatic_cache import automatic_cache
from .build import build_model, check_settings, count_source_rows, first_batches, make_trainer
from .checkpoint_folders import (
    checkpoint_root,
    newest_checkpoint,
    prepare_checkpoint_root,
    refuse_existing_checkpoints,
)
from .checkpoints import check_compatible
from .eval_batches import EvalBatches, measures_image_loss_gap
from .evaluation import Evaluator, apply_best, evaluation_callbacks
from .hub_checkpoints import BackgroundUploads, PushCheckpoints, background_uploads, prepare_repository
from .image_loss import LogLossesBefore, final_losses, logged_losses
from .interruptions import StopOnSignal, attach_memory_plan, io_errors_as_user_error, oom_as_user_error
from .monitoring import ProgressBar, tracker_callbacks
from .non_finite import SKIPPED, count_skipped_steps
from .output_dir import archive_metrics, prepare_output_dir
from .pair_rewards import measure_pair_rewards, pair_batches
from .preflight import evaluation_warnings, memory_notice
from .resume import StartPoint, find_start_point, pin_init_from
from .stage_results import LEFT_OUT_FILE
from .stages import train_stages
from .trained_on import trained_on
from .trainer import FlamingoTrainerMixin

FINAL_LOSS_SAMPLES = 256  # held-out samples, of each kind, for the losses of a run without eval.steps

DataCallback = Callable[[OpenedData], None]
LogFunction = Callable[[str], None]


def train(
    recipe: Recipe,
    on_data: DataCallback | None = None,
    *,
    resume: bool = False,
    log: LogFunction | None = None,
    tell: DataCallback | None = None,
    say: LogFunction | None = None,
) -> dict[str, Any]:
    """Train as the recipe says, stage by stage, save the adapter in its output directory, and evaluate it.

    on_data: called with the data once they are open. resume: resume this run if there is anything of it. log:
    called with lines for the user: where the run resumes, planned and free memory, held-out images that are
    trained on; None skips the checks behind them. tell, say: deprecated names of on_data and log.

    Returns what is written to ``metrics.json``. Raises UserError, before training, for unusable data,
    backbones or output directories, OutOfMemory (a UserError with a memory plan), and StoppedBySignal if a
    signal ended the run.
    """
    if tell is not None or say is not None:
        warnings.warn("train(tell=, say=) are now on_data= and log=", FutureWarning, stacklevel=2)
        on_data, log = on_data or tell, log or say
    train_run = partial(_train_run, resume=resume, on_data=on_data, log=log)
    if recipe.stages:
        return train_stages(recipe, train_run, resume=resume, notify=log or (lambda line: None))
    return train_run(recipe, lambda: None)


def _train_run(
    recipe: Recipe,
    on_begin: Callable[[], None],
    *,
    resume: bool,
    on_data: DataCallback | None,
    log: LogFunction | None,
) -> dict[str, Any]:
    """Train as a recipe without stages says.

    on_begin: called in the main process once nothing is left that could refuse the run, before training.
    """
    try:
        with io_errors_as_user_error(recipe.train):
            return _train_whole_run(recipe, on_begin, resume, on_data, log)
    except OutOfMemory as error:
        out_of_memory = error
    # Outside the except block, whose traceback would keep the tensors alive.
    raise attach_memory_plan(out_of_memory, recipe)


def _train_whole_run(
    recipe: Recipe,
    on_begin: Callable[[], None],
    resume: bool,
    on_data: DataCallback | None,
    log: LogFunction | None,
) -> dict[str, Any]:
    """Check and prepare everything that needs no model, then run."""
    notify = log or (lambda line: None)
    check_settings(recipe)
    if recipe.train.epochs is not None:
        recipe = _with_counted_steps(recipe, notify)
    start = processes.run_on_main(partial(find_start_point, recipe)) if resume else StartPoint()
    if processes.is_main():
        for note in start.notes:
            notify(note)
    if start.finished:
        return json.loads((recipe.train.output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    check_start(recipe.model)
    recipe = processes.run_on_main(partial(pin_init_from, recipe, start.checkpoint))
    processes.run_on_main(partial(_prepare_folders, recipe, resume, start.checkpoint is not None))
    train_config, stop = recipe.train, StopOnSignal()
    with (
        stop.handlers_installed(),
        background_uploads(train_config.push_to_hub, train_config.save_total_limit, notify) as uploads,
    ):
        with final_report(train_config.output_dir):
            if log and processes.is_main():
                log(memory_notice(recipe))
                for line in method_warnings(recipe):
                    log(f"warning: {line}")
            metrics = _run(recipe, start.checkpoint, stop, uploads, on_begin, on_data, log)
        if uploads is not None:
            uploads.push_run(train_config.output_dir)
    return metrics


def _with_counted_steps(recipe: Recipe, notify: LogFunction) -> Recipe:
    """Return the recipe with ``epochs`` converted to ``max_steps``, and log the number."""
    with processes.raise_together():
        data = open_data(recipe.data, recipe.train.seed)
        counted = with_max_steps(recipe, data)
    if processes.is_main():
        samples = f"{recipe.train.epochs:g} x {samples_per_epoch(recipe, data):,} samples"
        notify(f"train.epochs: {samples} are {counted.train.max_steps:,} optimizer steps")
    return counted


def _prepare_folders(recipe: Recipe, resume: bool, has_checkpoint: bool) -> None:
    prepare_output_dir(recipe.train.output_dir, resume=resume, has_checkpoint=has_checkpoint)
    root = checkpoint_root(recipe.train)
    if not has_checkpoint:
        refuse_existing_checkpoints(root)
    prepare_checkpoint_root(root)
    if recipe.train.push_to_hub:
        prepare_repository(recipe.train.push_to_hub, starts_new_run=not has_checkpoint)


def _run(
    recipe: Recipe,
    checkpoint: Path | None,
    stop: StopOnSignal,
    uploads: BackgroundUploads | None,
    on_begin: Callable[[], None],
    on_data: DataCallback | None,
    log: LogFunction | None,
) -> dict[str, Any]:
    """Load data and model, train, evaluate, and write the run's files, ``metrics.json`` last."""
    output_dir = recipe.train.output_dir
    with progress_bars(disable=not processes.is_main()) as progress:
        with processes.raise_together():
            data = _open_data(recipe, checkpoint, on_data)
            eval_samples = data.eval_samples(recipe.eval.max_samples)
            metrics_of_answers = select_metrics(recipe.eval, questions_of(eval_samples))
            with oom_as_user_error("loading"):
                model, processor = build_model(recipe, partial(first_batches, data, recipe))
            model.config.trained_on = trained_on(recipe, data, model.config.trained_on)
            eval_samples = data.with_boxes_written(eval_samples, processor)
            # Raises for questions longer than the context, which would otherwise fail only after training.
            Predictor(model, processor).encode(questions_of(eval_samples))
            if log and processes.is_main():
                for line in evaluation_warnings(data, eval_samples, processor, recipe.eval.max_new_tokens):
                    log(line)
        # A separate block: from here on the processes of a sharded model wait for each other, and an error
        # occurs in all of them.
        with processes.raise_together():
            callbacks = _callbacks(recipe, processor, progress, stop)
            cached = _with_automatic_cache(recipe, model, data, log)
            trainer = make_trainer(model, processor, data, cached, callbacks)
        if uploads is not None:
            trainer.add_callback(PushCheckpoints(uploads, checkpoint_root(recipe.train), trainer.meter))
        if processes.is_main():
            on_begin()
            archive_metrics(output_dir)
            atomic.write_text(output_dir / RECIPE_FILE, dump_recipe(recipe))
        evaluator = Evaluator(model, processor, eval_samples, recipe, progress, metrics_of_answers)
        eval_batches = _prepare_eval_batches(trainer, evaluator, eval_samples, processor, recipe, progress)
        pairs = pair_batches(trainer, eval_samples, processor, recipe, progress)
        if recipe.eval.before:
            _evaluate_before(evaluator, eval_samples, checkpoint, output_dir)
        train_metrics = _train(trainer, data, recipe, checkpoint, stop)
        save_adapter(model, processor, output_dir, write=processes.is_main())
        evaluator.evaluate(AFTER, eval_samples)
        if recipe.eval.shuffled_images:
            evaluator.evaluate(SHUFFLED, with_other_images(eval_samples, recipe.train.seed))
        if eval_batches is not None:
            _add_losses(evaluator.results, trainer, recipe, eval_batches)
        if pairs is not None:
            _add_pair_rewards(evaluator.results, trainer, recipe, pairs)
        progress.refresh()  # otherwise notebooks show the last bar unfinished
    metrics = {"eval": evaluator.results.summary()} if eval_samples else {}
    probe = find_probe(output_dir, recipe)
    add_to_verdict(metrics, recipe, evaluator.results, probe)
    add_advice(metrics, recipe, evaluator.results, trainer.state.log_history, probe)
    metrics["train"] = train_metrics
    if processes.is_main():
        evaluator.results.save(output_dir)
        scores, others = card_tables(metrics.get("eval")), run_tables(metrics)
        write_card(output_dir, metrics, tables=scores, run_tables=others)
        atomic.write_text(output_dir / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    processes.barrier()
    return metrics


def _with_automatic_cache(
    recipe: Recipe, model: FlamingoForConditionalGeneration, data: OpenedData, log: LogFunction | None
) -> Recipe:
    """Return the recipe with the feature cache that pays for it, if any, and log that."""
    chosen = automatic_cache(model, data, recipe)
    if chosen is None:
        return recipe
    if log and processes.is_main():
        log(chosen.note())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": chosen.section})})


def _open_data(recipe: Recipe, checkpoint: Path | None, on_data: DataCallback | None) -> OpenedData:
    """Open and check the data; when resuming, also against the checkpoint's."""
    data = open_data(recipe.data, recipe.train.seed)
    if on_data is not None and processes.is_main():
        on_data(data)
    check_method(data.train, recipe.train.method)
    data.validate_rows()
    if checkpoint:
        check_compatible(checkpoint, count_source_rows(data))
    return data


def _callbacks(
    recipe: Recipe, processor: FlamingoProcessor, progress: Bars, stop: StopOnSignal
) -> list[TrainerCallback]:
    output_dir = recipe.train.output_dir
    return [
        LogFile(output_dir),
        *tracker_callbacks(recipe.train),
        ProgressBar(progress, known_metrics(recipe.eval)),
        LiveReport(output_dir),
        *evaluation_callbacks(recipe, processor),
        stop,
    ]


def _prepare_eval_batches(
    trainer: FlamingoTrainerMixin,
    evaluator: Evaluator,
    samples: Sequence[Sample],
    processor: FlamingoProcessor,
    recipe: Recipe,
    progress: Bars,
) -> EvalBatches | None:
    """Set what evaluations during training measure; return the batches for it, if any are needed.

    Without ``eval.steps``, only the losses before and after training need them: a random part of the samples
    is enough, and none is refused for their sake.
    """
    measures_gap = measures_image_loss_gap(recipe)
    measures_text = recipe.train.method in ("sft", "grpo") and not all(sample.images for sample in samples)
    if not (recipe.eval.steps or measures_gap or measures_text):
        return None
    if not recipe.eval.steps:
        samples = _some_of_each_kind(samples, recipe.train.seed)
    eval_batches = EvalBatches(
        samples,
        trainer.model,
        processor,
        recipe,
        progress,
        features=trainer.batches.features,
        skip_unusable=not recipe.eval.steps,
    )
    if recipe.eval.steps:
        trainer.set_eval(eval_batches, evaluator.scores if recipe.eval.answers else None)
    if recipe.eval.before:
        with_gap = measures_gap and recipe.eval.steps is not None
        trainer.add_callback(LogLossesBefore(trainer, eval_batches, with_gap))
    return eval_batches


def _some_of_each_kind(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Return at most `FINAL_LOSS_SAMPLES` with images, and as many without."""
    chosen = []
    for has_images in (True, False):
        own = [sample for sample in samples if bool(sample.images) is has_images]
        few = len(own) <= FINAL_LOSS_SAMPLES
        chosen += own if few else random.Random(seed).sample(own, FINAL_LOSS_SAMPLES)
    return chosen


def _add_losses(results: Results, trainer: Any, recipe: Recipe, eval_batches: EvalBatches) -> None:
    """Add the losses of the final model to the results, and by kind of row also those before training."""
    final = final_losses(trainer, recipe, eval_batches)
    results.image_loss_gap = final.gap
    if final.by_kind is not None and logged_losses(trainer, trainer.state.global_step).by_kind is None:
        _add_to_log(trainer, recipe, final.by_kind.log_values())
    for condition, measured in ((BEFORE, logged_losses(trainer, 0).by_kind), (AFTER, final.by_kind)):
        if measured is not None:
            results.loss_by_kind[condition] = measured


def _add_pair_rewards(results: Results, trainer: Any, recipe: Recipe, pairs: EvalBatches) -> None:
    """Add the rewards of held-out pairs to the results, and to the log if evaluations did not."""
    results.pairs = measure_pair_rewards(trainer, pairs, recipe)
    if results.pairs is not None and not recipe.eval.steps:
        _add_to_log(trainer, recipe, results.pairs.log_values())


def _add_to_log(trainer: Any, recipe: Recipe, values: Mapping[str, float]) -> None:
    """Add an entry about the end of the run to its log, which training has closed."""
    trainer.state.log_history.append({**values, "step": trainer.state.global_step})
    if processes.is_main():
        write_log(recipe.train.output_dir, trainer.state.log_history)


def _evaluate_before(
    evaluator: Evaluator, samples: Sequence[Sample], checkpoint: Path | None, output_dir: Path
) -> None:
    """Generate the answers from before training or, when resuming, read them from the checkpoint."""
    if checkpoint is None:
        evaluator.evaluate(BEFORE, samples)
    else:
        evaluator.results.restore(BEFORE, checkpoint)
    if processes.is_main():
        evaluator.results.save(output_dir)


def _train(
    trainer: FlamingoTrainerMixin,
    data: OpenedData,
    recipe: Recipe,
    checkpoint: Path | None,
    stop: StopOnSignal,
) -> dict[str, Any]:
    """Run the trainer and return the ``train`` part of ``metrics.json``."""
    output_dir = recipe.train.output_dir
    try:
        with oom_as_user_error("training"):
            trainer.train_from(checkpoint)
    except ReportedElsewhere:
        raise
    except UserError as error:
        error.args = (f"{error}{_resume_hint(recipe)}",)
        raise
    finally:
        if processes.is_main():
            _write_left_out(data.skipped | trainer.batches.stats.skipped_rows, output_dir)
    if stop.signal is not None:
        raise StoppedBySignal(stop.signal, trainer.state.global_step)
    per_process = processes.all_gather((trainer.batches.stats.metrics(), trainer.batches.stats.skipped_rows))
    if processes.is_main():
        left_out = dict(data.skipped)
        for _, rows in per_process:
            left_out |= rows
        _write_left_out(left_out, output_dir)
        write_log(output_dir, trainer.state.log_history)
    metrics: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "seconds": round(trainer.seconds(), 1),
        "trainable_parameters": sum(
            p.numel() for p in trainable_parameters(trainer.unwrapped_model()).values()
        ),
    }
    if skipped := count_skipped_steps(trainer.state.log_history):
        metrics[SKIPPED] = skipped
    metrics |= apply_best(trainer, recipe)
    metrics["data"] = total_metrics([counts for counts, _ in per_process])
    if data.skipped:
        metrics["data"]["held_out_skipped"] = len(data.skipped)
    return metrics


def _resume_hint(recipe: Recipe) -> str:
    """Return a line about the last checkpoint for a run that an error ended; empty without one."""
    newest = newest_checkpoint(checkpoint_root(recipe.train))
    if newest is None:
        return ""
    return f"\n{newest}: the last checkpoint; fix the problem, and resume from there with --resume"


def _write_left_out(reasons: Mapping[str, str], output_dir: Path) -> None:
    """List the rows that were not used, and why, also for a run that ended because there were too many."""
    if reasons:
        lines = [json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in reasons.items()]
        atomic.write_text(output_dir / LEFT_OUT_FILE, "".join(lines))
