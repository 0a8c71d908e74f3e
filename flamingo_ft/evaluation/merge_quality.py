"""Whether a merged model is as good as its adapter: loss and metrics of both on the same samples.

The samples are held-out ones of the run or, if those are not here, made-up prompts. Distances between logits
are reported but decide nothing: 4-bit quantization alone moves a real model's logits by a third of the
largest, so they do not separate a wrong merge from a right one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flamingo_ft.backbones.decoder_layers import context_length
from flamingo_ft.config import RECIPE_FILE, Recipe, load_recipe
from flamingo_ft.data import Dropped, Encoded, OpenedData, Sample, encode_within, open_data
from flamingo_ft.data.collate import load_media
from flamingo_ft.data.encode import IGNORED, TooLong, encode_prompt
from flamingo_ft.data.sample import UNNAMED_TASK, text_message
from flamingo_ft.errors import UserError
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .bootstrap import bootstrap_interval
from .image_loss_gap import ratio_standard_error
from .metrics import MERGE_METRIC, Metric, user_metrics_record
from .questions import Question, questions_of
from .scores import interval_record
from .select_metrics import select_metrics

HELD_OUT = "held-out samples of the run"
TRAINED_ON = "samples that the run was trained on (it holds none out)"
MADE_UP = "made-up prompts (the run's samples were not found; the adapter's answers stand in for right ones)"
MAX_QUESTIONS = 32  # generating an answer costs more than computing a loss
NOISE_IMAGES, MADE_UP_TOKENS = 3, 16  # made-up prompts with an image; longest answer to one
STAND_IN = "A bird on a branch, to the left."  # for an empty answer, which may leave no tokens for a loss
# In nats per token. SmolLM2-135M, small enough to suffer most, loses or gains 0.2 just by leaving nf4.
LOSS_MARGIN = 0.5
# Multiplies the loss margin on made-up prompts, whose references are the adapter's own answers and favor it.
MADE_UP_FACTOR = 4
MAX_POSITIONS = 256  # label positions whose logits are compared: 150 MB for a vocabulary of 150,000


@dataclass(frozen=True)
class EvalSet:
    """What adapter and merged model are compared on.

    encoded: samples for the loss. questions: for the metrics. origin: where they come from, in words.
    metrics: what the answers are scored by.
    """

    encoded: Sequence[tuple[Sample, Encoded]]
    questions: Sequence[Question]
    origin: str
    batch_size: int = 8
    max_new_tokens: int = MADE_UP_TOKENS
    metrics: Sequence[Metric] = (MERGE_METRIC,)

    @property
    def made_up(self) -> bool:
        """Whether the reference answers are only the adapter's own."""
        return self.origin == MADE_UP


def eval_set_of_run(folder: Path, processor: FlamingoProcessor, context: int, samples: int) -> EvalSet | None:
    """Return at most ``samples`` samples of the run in ``folder``: held-out ones, else training samples.

    None if the recipe or its data is not here, or no sample has an answer within ``context`` tokens.
    """
    if not (folder / RECIPE_FILE).is_file():
        return None
    try:
        recipe = load_recipe(folder / RECIPE_FILE, require=("data",))
        data = open_data(recipe.data, recipe.train.seed)
        selected = data.with_boxes_written(_select(data, samples), processor)
        limit = min(recipe.data.max_text_tokens or context, context)
        encoded = _encode(selected, processor, limit, recipe.data.too_long)
    except UserError:
        return None
    if not encoded:
        return None
    questions = [q for q in questions_of(selected) if len(encode_prompt(processor, q.messages)) < context]
    questions = questions[: min(samples, MAX_QUESTIONS)]
    origin = HELD_OUT if data.eval else TRAINED_ON
    batch_size, max_new_tokens = recipe.eval.batch_size, recipe.eval.max_new_tokens
    return EvalSet(encoded, questions, origin, batch_size, max_new_tokens, _metrics(recipe, questions))


def _metrics(recipe: Recipe, questions: Sequence[Question]) -> list[Metric]:
    """Return the metric that decides, and those of the run unless one cannot be computed here.

    The others are only reported: a user's file that is not on this machine must not prevent a merge.
    """
    try:
        selected = select_metrics(recipe.eval, questions)
    except UserError:
        return [MERGE_METRIC]
    return [MERGE_METRIC, *(metric for metric in selected if metric is not MERGE_METRIC)]


def _select(data: OpenedData, samples: int) -> list[Sample]:
    """Return readable samples of every held-out source, or of every training source if none is held out."""
    sources = data.eval or data.train
    per_source = -(-samples // len(sources))
    return replace(data, eval=sources).eval_samples(per_source)[:samples]


def _encode(
    samples: Sequence[Sample],
    processor: FlamingoProcessor,
    limit: int,
    policy: TooLong = "error",
) -> list[tuple[Sample, Encoded]]:
    """Encode samples as in training; those that training drops as too long are left out."""
    pairs = [(sample, encode_within(processor, sample, limit, policy)) for sample in samples]
    return [(sample, encoded) for sample, encoded in pairs if not isinstance(encoded, Dropped)]


def made_up_eval_set(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> EvalSet:
    """Return questions about noise images and one without an image, with the adapter's answers."""
    generator = np.random.default_rng(0)
    content = [{"type": "image"}, {"type": "text", "text": "What is in this picture, and where?"}]
    prompts = [
        Question([{"role": "user", "content": content}], [_noise(generator)], "made up")
        for _ in range(NOISE_IMAGES)
    ]
    prompts.append(Question([text_message("user", "Name three colours.")], [], "made up"))
    answers = Predictor(model, processor).answer(prompts, max_new_tokens=MADE_UP_TOKENS)
    samples = [
        Sample(
            [*prompt.messages, text_message("assistant", answer or STAND_IN)],
            list(prompt.images),
            UNNAMED_TASK,
            prompt.where,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    encoded = _encode(samples, processor, context_length(model.config))
    return EvalSet(encoded, questions_of(samples), MADE_UP)


def _noise(generator: np.random.Generator) -> bytes:
    """Return a PNG file of random pixels."""
    file = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Measurement:
    """One model on an `EvalSet`.

    losses: summed over the label tokens of each sample. tokens: label tokens of each sample. statistics: of
    each question, by metric. logits (N positions, V vocabulary): at the first label positions.
    """

    losses: Sequence[float]
    tokens: Sequence[int]
    statistics: Mapping[str, np.ndarray]
    logits: Tensor

    @property
    def loss(self) -> float:
        """Mean over all label tokens, in nats."""
        return sum(self.losses) / sum(self.tokens)

    def value(self, metric: Metric) -> float | None:
        """Return the value of a metric; None without questions, or where it is not defined."""
        return metric.value(self.statistics[metric.name])

    def interval(self, metric: Metric) -> dict[str, float | None] | None:
        """Return the value of a metric with its 95 % bootstrap interval, for JSON; None without questions."""
        statistics = self.statistics[metric.name]
        return interval_record(bootstrap_interval(statistics, metric.aggregate)) if len(statistics) else None


@torch.no_grad()
def measure(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, eval_set: EvalSet
) -> Measurement:
    """Compute the loss of each sample, one at a time, and answer the questions."""
    losses, tokens, kept, room = [], [], [], MAX_POSITIONS
    for sample, encoded in eval_set.encoded:
        logits, labels = _label_logits(model, processor, sample, encoded)
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
        tokens.append(len(labels))
        kept.append(logits[:room].cpu())
        room -= len(kept[-1])
    questions = eval_set.questions
    answers = Predictor(model, processor).answer(
        questions, batch_size=eval_set.batch_size, max_new_tokens=eval_set.max_new_tokens
    )
    statistics = {metric.name: metric.measure(questions, answers) for metric in eval_set.metrics}
    return Measurement(losses, tokens, statistics, torch.cat(kept))


def _label_logits(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, sample: Sample, encoded: Encoded
) -> tuple[Tensor, Tensor]:
    """Return logits (N, V), in float32, of the N positions that predict a label, and the labels (N,)."""
    media = load_media(processor, [{"images": sample.images[: encoded.images], "where": sample.where}])
    inputs = {"input_ids": torch.tensor([encoded.input_ids]), **media}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    labels = torch.tensor(encoded.labels[1:], device=logits.device)
    has_label = labels != IGNORED
    return logits[has_label].float(), labels[has_label]


def compare(
    models: Mapping[str, Measurement], eval_set: EvalSet, loss_margin: float, accuracy_margin: float | None
) -> dict[str, Any]:
    """Return the ``cost`` record of merge.json, with how much worse ``merged`` is than ``adapter``.

    loss_increase, accuracy_drop: with the standard errors of the paired differences. worse: whether the loss
    or a metric with a margin is beyond its margin by more than two standard errors, or the loss is not
    finite. Made-up prompts have no true answers: metrics on them decide nothing, and the margin of the loss
    is wider.
    """
    adapter, merged = models["adapter"], models["merged"]
    increase = merged.loss - adapter.loss
    differences = [m - a for m, a in zip(merged.losses, adapter.losses, strict=True)]
    loss_error = ratio_standard_error(differences, merged.tokens)
    limit = loss_margin * MADE_UP_FACTOR if eval_set.made_up else loss_margin
    worse = not increase - 2 * loss_error <= limit  # also if it is NaN
    record: dict[str, Any] = {
        "samples": len(merged.losses),
        "label_tokens": sum(merged.tokens),
        "answers": len(eval_set.questions),
        "loss": {name: measurement.loss for name, measurement in models.items()},
        "loss_increase": increase,
        "loss_increase_standard_error": loss_error,
        "margin": limit,
    }
    for metric in eval_set.metrics:
        name = metric.name
        drop, error = _drop(metric, adapter.statistics[name], merged.statistics[name])
        margin = accuracy_margin if metric is MERGE_METRIC else metric.merge_margin
        if eval_set.made_up:
            margin = None
        record |= {
            name: {model: measurement.value(metric) for model, measurement in models.items()},
            f"{name}_interval": {model: measured.interval(metric) for model, measured in models.items()},
            f"{name}_drop": drop,
            f"{name}_drop_standard_error": error,
            f"{name}_margin": margin,
        }
        worse = worse or (margin is not None and drop - 2 * error > margin)
    return record | user_metrics_record(eval_set.metrics) | {"worse": worse}


def _drop(metric: Metric, adapter: np.ndarray, merged: np.ndarray) -> tuple[float, float]:
    """Return how much worse the merged model is by a metric, and the standard error of that.

    adapter, merged: statistics of the same questions. The jackknife takes any aggregate; for a mean, it
    equals the standard error of the paired differences. Both are 0 where the metric is not defined.
    """
    drop, count = _worse_by(metric, adapter, merged), len(adapter)
    if count < 2:
        return drop, 0.0
    without_one = [
        _worse_by(metric, np.delete(adapter, index, axis=0), np.delete(merged, index, axis=0))
        for index in range(count)
    ]
    center = sum(without_one) / count
    error = math.sqrt(sum((other - center) ** 2 for other in without_one) * (count - 1) / count)
    return drop, error


def _worse_by(metric: Metric, adapter: np.ndarray, merged: np.ndarray) -> float:
    before, after = metric.value(adapter), metric.value(merged)
    if before is None or after is None:
        return 0.0
    return before - after if metric.higher_is_better else after - before


def logit_difference(measured: Measurement, expected: Measurement) -> dict[str, Any]:
    """Compare two models' logits.

    Returns their largest difference, the same relative to the largest logit, and the fraction of positions
    (token_agreement) at which both predict the same token.
    """
    largest = float((measured.logits - expected.logits).abs().max())
    agreement = (measured.logits.argmax(-1) == expected.logits.argmax(-1)).float().mean()
    return {
        "max_logit_difference": largest,
        "relative": largest / float(expected.logits.abs().max()),
        "token_agreement": float(agreement),
        "tokens": len(expected.logits),
        "prompts": len(expected.losses),
    }
