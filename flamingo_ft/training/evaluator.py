"""Evaluation before, during and after training: answers to held-out questions, loss on held-out samples.

It does not change what training learns: it draws no random numbers and puts the model back into training
mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.encode import IGNORED, Dropped
from flamingo_ft.data.examples import Example
from flamingo_ft.data.media import PixelLoader
from flamingo_ft.data.opened_data import encoder
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import evaluate_metrics
from flamingo_ft.evaluation.questions import Question, questions_of
from flamingo_ft.evaluation.results import Results
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.backbone_files import text_limit
from flamingo_ft.model.sharding import is_sharded
from flamingo_ft.progress import Bars

from .dataloader import COLLATE
from .machine_failures import oom_as_user_error

# A batch, and the weight of its loss in the mean: its number of label tokens (SFT) or of pairs (DPO).
WeightedBatch = tuple[dict[str, Tensor], int]


class Evaluator:
    """Asks the held-out questions at several times of a run; ``results`` collects the answers."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        samples: Sequence[Sample],
        recipe: Recipe,
        progress: Bars,
    ):
        self.results = Results(questions_of(samples))
        self._options = {"batch_size": recipe.eval.batch_size, "max_new_tokens": recipe.eval.max_new_tokens}
        self._predictor = Predictor(model, processor)
        self._progress, self._model = progress, model

    def scores(self) -> dict[str, float]:
        """Ask the held-out questions and return the value of every metric; the answers are not kept."""
        questions = self.results.questions
        return evaluate_metrics(questions, self._answers("evaluating", questions, keep_bar=False))

    def evaluate(self, name: str, samples: Sequence[Sample]) -> None:
        """Ask about ``samples``, the held-out ones or a variant of them; keep the answers under ``name``."""
        questions = questions_of(samples)
        if questions:
            self.results.answers[name] = self._answers(f"evaluating, {name.replace('_', ' ')}", questions)

    def _answers(self, title: str, questions: Sequence[Question], keep_bar: bool = True) -> list[str]:
        """Return the answers in the order of ``questions``.

        The processes share the questions out; with a sharded model each of them runs all questions.
        """
        sharded = is_sharded(self._model)
        own_questions = questions if sharded else processes.shard(questions)
        bar = self._progress.add_task(title, total=len(own_questions), note="")
        with oom_as_user_error("evaluation"):
            on_batch = partial(self._progress.advance, bar)
            answers = self._predictor.answer(own_questions, on_batch=on_batch, **self._options)
        if not keep_bar:
            self._progress.remove_task(bar)
        return answers if sharded else processes.unshard(answers)


class EvalBatches:
    """Iterable over the weighted batches of the held-out samples, each sample once, always in the same order.

    Process ``rank`` of ``world_size`` (None: this process) gets every ``world_size``-th batch. All processes
    get the same number of batches; the last one may be a repetition with weight 0.

    Raises UserError for samples that ``data.too_long`` refuses, for samples without a rejected answer if
    ``train.method`` is dpo, and if no sample has label tokens.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        recipe: Recipe,
        progress: Bars | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if recipe.train.method == "dpo":
            _refuse_single_answers(samples)
        limit = text_limit(model.config, recipe.data.max_text_tokens)
        encode = encoder(processor, recipe, limit)
        encoded = [(sample, encode(sample)) for sample in samples]
        kept = [(sample, text) for sample, text in encoded if not isinstance(text, Dropped)]
        if not kept:
            raise UserError(
                "eval.steps: no held-out sample has label tokens; set eval.steps to null, or fix data.eval"
            )
        kept.sort(key=lambda pair: pair[1].text_tokens)  # little padding; the sort is stable
        size = recipe.eval.batch_size
        self._batches = [kept[start : start + size] for start in range(0, len(kept), size)]
        self._read_media = PixelLoader(processor)
        self._collate = partial(COLLATE[recipe.train.method], processor.tokenizer.pad_token_id, False, None)
        self._weight = WEIGHTS[recipe.train.method]
        self._progress = progress
        self._rank = processes.rank() if rank is None else rank
        self._world_size = world_size or processes.world_size()

    def __iter__(self) -> Iterator[WeightedBatch]:
        rounds = -(-len(self._batches) // self._world_size)
        indices = range(self._rank, rounds * self._world_size, self._world_size)
        for index in indices if self._progress is None else _with_bar(self._progress, indices):
            batch = self._batches[min(index, len(self._batches) - 1)]
            rows = [
                [Example(sample.where, text, self._read_media(sample, text.images, 0))]
                for sample, text in batch
            ]
            inputs = self._collate(rows)
            yield inputs, self._weight(inputs) if index < len(self._batches) else 0


def _with_bar(progress: Bars, indices: range) -> Iterator[int]:
    """Iterate over ``indices`` with a progress bar that is removed at the end."""
    bar = progress.add_task("held-out loss", total=len(indices), note="")
    for index in indices:
        yield index
        progress.advance(bar)
    progress.remove_task(bar)


def _refuse_single_answers(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if not sample.rejected:
            raise UserError(
                f"{sample.where}: got one answer, but eval.steps compares two if train.method is dpo; "
                "use preference pairs in data.eval, or set eval.steps to null"
            )


def _count_label_tokens(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def _count_pairs(inputs: dict[str, Tensor]) -> int:
    return len(inputs["input_ids"]) // 2


WEIGHTS = {"sft": _count_label_tokens, "dpo": _count_pairs}


@torch.no_grad()
def run_evaluation(
    trainer: Any, eval_batches: EvalBatches, scores_fn: Callable[[], dict[str, float]] | None
) -> dict[str, float]:
    """Evaluate the trainer's model and log the result.

    Returns ``eval_loss``, the mean over all label tokens or pairs, and, if ``scores_fn`` is given, its
    metrics (``eval_accuracy``, ...).
    """
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    total = torch.zeros(
        2, dtype=torch.float64, device=trainer.args.device
    )  # sum of weighted losses, of weights
    for inputs, weight in eval_batches:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer.prepare_inputs(inputs))
        total += torch.stack([loss.double() * weight, torch.full_like(loss, weight, dtype=torch.float64)])
    loss_sum, weight_sum = trainer.accelerator.reduce(total).tolist()
    metrics = {"eval_loss": loss_sum / weight_sum}
    if scores_fn is not None:
        metrics |= {f"eval_{name}": value for name, value in scores_fn().items()}
    model.eval()  # TRL logs its own metrics as evaluation ones only in this mode
    trainer.log(dict(metrics))
    model.train(was_training)
    return metrics
