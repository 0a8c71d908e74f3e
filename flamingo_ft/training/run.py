"""A whole run: recipe -> model -> training -> adapter -> evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flamingo_ft import atomic, processes
from flamingo_ft.adapters import check_start, save_adapter, trainable_parameters, write_card
from flamingo_ft.config import METRICS_FILE, RECIPE_FILE, Recipe, dump_recipe
from flamingo_ft.data import OpenedData, Sample, open_data
from flamingo_ft.data.epochs import samples_per_epoch, with_max_steps
from flamingo_ft.data.stream.examples import total_metrics
from flamingo_ft.errors import OutOfMemory, Stopped, ToldElsewhere, UserError
from flamingo_ft.evaluation.questions import as_row, questions_of, with_other_images
from flamingo_ft.evaluation.results import AFTER, BEFORE, SHUFFLED
from flamingo_ft.inference.answer import encode_prompts
from flamingo_ft.progress import progress_bars
from flamingo_ft.report import LiveReport, leaving_a_report
from flamingo_ft.report.log_file import LogFile, write_log

from .best import evaluation_callbacks, take_best
from .build import build_model
from .callbacks import ProgressBar
from .checkpoints import check_fits, checkpoint_root, checkpoints, prepare_root, refuse_earlier
from .examination import Examination
from .held_out import HeldOut
from .hub import Pushing, prepare_repository, pushing
from .machine_faults import io_errors_as_user_error
from .non_finite import skipped_record
from .notices import memory_line, warnings_about_evaluation
from .optimizer import check_machine
from .out_of_memory import oom_as_user_error, with_plan
from .output_dir import keep_earlier_metrics, prepare_output_dir
from .precision import check_precision
from .resume import Start, find_start
from .start_from import with_pinned_start
from .stopping import Stopping
from .trackers import check_trackers, tracker_callbacks
from .trainer import FlamingoTrainer, first_batches, make_trainer, rows_of

LEFT_OUT_FILE = "left_out.jsonl"


def train(
    recipe: Recipe,
    tell: Callable[[OpenedData], None] = lambda data: None,
    *,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train as the recipe says, save the adapter in its output directory, and evaluate it.

    tell: called with the data once it is open. resume: resume what there is of this run. say: called with lines for the
    user: where it resumes, planned and free memory, held-out images that are trained on; None: none of that is looked at.
    Returns what is written to ``metrics.json``. Raises UserError for data, backbones or an output directory that will
    not do, before training, OutOfMemory, which is one with a plan, and Stopped where a signal ended the run.
    """
    try:
        with io_errors_as_user_error(recipe.train):
            return _whole_run(recipe, tell, resume, say)
    except OutOfMemory as error:
        failed = error
    raise with_plan(failed, recipe)


def _whole_run(
    recipe: Recipe, tell: Callable[[OpenedData], None], resume: bool, listener: Callable[[str], None] | None
) -> dict[str, Any]:
    say = listener or (lambda line: None)
    check_machine(recipe.train)
    check_precision(recipe)
    check_trackers(recipe.train)
    if recipe.train.epochs is not None:
        recipe = _with_counted_steps(recipe, say)
    start = processes.from_main(partial(find_start, recipe)) if resume else Start()
    for note in start.notes if processes.is_main() else ():
        say(note)
    if start.finished:
        return json.loads((recipe.train.output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    check_start(recipe.model)
    recipe = processes.from_main(partial(with_pinned_start, recipe, start.checkpoint))
    processes.from_main(partial(_prepare_folders, recipe, resume, start.checkpoint is not None))
    stopping, wanted = Stopping(), recipe.train
    with stopping.listening(), pushing(wanted.push_to_hub, wanted.save_total_limit, say) as uploads:
        with leaving_a_report(wanted.output_dir):
            if listener and processes.is_main():
                say(memory_line(recipe))
            metrics = _run(recipe, start, stopping, tell, uploads, listener)
        if uploads is not None:
            uploads.push_run(wanted.output_dir)
    return metrics


def _with_counted_steps(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with its epochs in optimizer steps, which are reported."""
    with processes.failing_together():
        data = open_data(recipe.data, recipe.train.seed)
        counted = with_max_steps(recipe, data)
    if processes.is_main():
        samples = f"{recipe.train.epochs:g} x {samples_per_epoch(recipe, data):,} samples"
        say(f"train.epochs: {samples} are {counted.train.max_steps:,} optimizer steps")
    return counted


def _prepare_folders(recipe: Recipe, resume: bool, has_checkpoint: bool) -> None:
    prepare_output_dir(recipe.train.output_dir, resume=resume, has_checkpoint=has_checkpoint)
    root = checkpoint_root(recipe.train)
    if not has_checkpoint:
        refuse_earlier(root)
    prepare_root(root)
    if recipe.train.push_to_hub:
        prepare_repository(recipe.train.push_to_hub, begins=not has_checkpoint)


def _run(
    recipe: Recipe,
    start: Start,
    stopping: Stopping,
    tell: Callable[[OpenedData], None],
    uploads: Pushing | None,
    listener: Callable[[str], None] | None,
) -> dict[str, Any]:
    """From the data to ``metrics.json``, the last file that is written."""
    output_dir = recipe.train.output_dir
    with progress_bars(disable=not processes.is_main()) as progress:
        with processes.failing_together():
            data = _open(recipe, start, tell)
            held_out = data.eval_samples(recipe.eval.max_samples)
            with oom_as_user_error("loading"):
                model, processor = build_model(recipe, partial(first_batches, data, recipe))
            # refuses too long ones
            encode_prompts(model, processor, [as_row(question) for question in questions_of(held_out)])
            if listener and processes.is_main():
                for line in warnings_about_evaluation(data, held_out, processor, recipe.eval.max_new_tokens):
                    listener(line)
            shown = [ProgressBar(progress), LiveReport(output_dir)]
            callbacks = [LogFile(output_dir), *tracker_callbacks(recipe.train), *shown]
            callbacks += [*evaluation_callbacks(recipe, processor), stopping]
        with (
            processes.failing_together()
        ):  # apart: a sharded model waits for all, which refuse the same from here on
            trainer = make_trainer(model, processor, data, recipe, callbacks)
            trainer.pushing = uploads
        if processes.is_main():
            keep_earlier_metrics(output_dir)
            atomic.write_text(output_dir / RECIPE_FILE, dump_recipe(recipe))
        examination = Examination(model, processor, held_out, recipe, progress)
        if recipe.eval.steps:
            trainer.judge_by(
                HeldOut(held_out, model, processor, recipe, progress),
                examination if recipe.eval.answers else None,
            )
        if recipe.eval.before:
            _examine_before(examination, held_out, start.checkpoint, output_dir)
        training = _train(trainer, data, recipe, start.checkpoint, stopping)
        save_adapter(model, processor, output_dir, write=processes.is_main())
        examination.take(AFTER, held_out)
        if recipe.eval.shuffled_images:
            examination.take(SHUFFLED, with_other_images(held_out, recipe.train.seed))
        progress.refresh()  # notebooks would show the last bar as it was a moment before
    metrics = {"eval": examination.results.summary()} if held_out else {}
    metrics["train"] = training
    if processes.is_main():
        examination.results.save(output_dir)
        write_card(output_dir, metrics)
        atomic.write_text(output_dir / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    processes.barrier()
    return metrics


def _open(recipe: Recipe, start: Start, tell: Callable[[OpenedData], None]) -> OpenedData:
    """The data, told of and looked through, and those that the checkpoint to go on from was trained on."""
    data = open_data(recipe.data, recipe.train.seed)
    if processes.is_main():
        tell(data)
    data.validate_rows()
    if start.checkpoint:
        check_fits(start.checkpoint, rows_of(data))
    return data


def _examine_before(
    examination: Examination, held_out: Sequence[Sample], checkpoint: Path | None, output_dir: Path
) -> None:
    """The answers from before training: given now, or those that a checkpoint kept."""
    if checkpoint is None:
        examination.take(BEFORE, held_out)
    else:
        examination.results.recall(BEFORE, checkpoint)
    if processes.is_main():
        examination.results.save(output_dir)


def _train(
    trainer: FlamingoTrainer, data: OpenedData, recipe: Recipe, checkpoint: Path | None, stopping: Stopping
) -> dict[str, Any]:
    """Run the trainer; what ``metrics.json`` says of it."""
    output_dir = recipe.train.output_dir
    try:
        with oom_as_user_error("training"):
            trainer.train_from(checkpoint)
    except ToldElsewhere:
        raise
    except UserError as error:
        error.args = (f"{error}{_where_to_go_on(recipe)}",)
        raise
    finally:
        if processes.is_main():
            _list_left_out(data.skipped | trainer.batches.stats.skipped_rows, output_dir)
    if stopping.number is not None:
        raise Stopped(stopping.number, trainer.state.global_step)
    tallies = processes.everyones((trainer.batches.stats.metrics(), trainer.batches.stats.skipped_rows))
    if processes.is_main():
        left_out = [data.skipped, *(rows for _, rows in tallies)]
        _list_left_out({where: why for rows in left_out for where, why in rows.items()}, output_dir)
        write_log(output_dir, trainer.state.log_history)
    parameters = sum(p.numel() for p in trainable_parameters(trainer.model).values())
    record = {"steps": trainer.state.global_step, "seconds": round(trainer.seconds(), 1)}
    record |= (
        {"trainable_parameters": parameters}
        | skipped_record(trainer.state.log_history)
        | take_best(trainer, recipe)
    )
    counts = total_metrics([counted for counted, _ in tallies])
    return record | {"data": counts | ({"held_out_skipped": len(data.skipped)} if data.skipped else {})}


def _where_to_go_on(recipe: Recipe) -> str:
    """A line for a run that an error ended, where it has a checkpoint."""
    newest = next(iter(checkpoints(checkpoint_root(recipe.train)).values()), None)
    return (
        f"\n{newest}: the last checkpoint; mend what is wrong, and go on from there with --resume"
        if newest
        else ""
    )


def _list_left_out(reasons: Mapping[str, str], output_dir: Path) -> None:
    """Where each row is that was not used, and why; a run that too many of them end has the list too."""
    if reasons:
        lines = [json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in reasons.items()]
        atomic.write_text(output_dir / LEFT_OUT_FILE, "".join(lines))
