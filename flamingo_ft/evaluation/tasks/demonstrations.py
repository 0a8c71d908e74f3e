"""Which training rows are shown as demonstrations: at random, the nearest by image features, or shuffled.

Random draws are those of OpenFlamingo's evaluation in one process, row for row: numpy's legacy generator
permutes the rows to evaluate and then draws the pool, torch's sampler (its seed is always 0) orders the
rows, and Python's generator draws each row's demonstrations from the pool
(github.com/mlfoundations/open_flamingo, open_flamingo/eval: utils.py, rices.py).

Shapes: E rows to evaluate, T training rows, K demonstrations, D width of a feature vector.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import Ranked
from flamingo_ft.formatting import plural

from .task import Example

POOL_SIZE = 2048
ZERO_SHOT_DEMONSTRATIONS = 2  # shown without their images, so that the model sees the form of an answer
SAMPLER_SEED = 0
SIMILARITIES_AT_ONCE = 1 << 24


def count_demonstrations(shots: int) -> int:
    """Return the number of demonstrations to draw: 0 shots are two demonstrations without their images.

    Raises UserError for a negative number.
    """
    if shots < 0:
        raise UserError(f"shots: must be 0 or more, got {shots}; correct it")
    return shots or ZERO_SHOT_DEMONSTRATIONS


def draw_eval_rows(rows: int, seed: int, count: int | None = None) -> np.ndarray:
    """Return indices (E,) of the rows to evaluate, in the order of evaluation.

    rows: how many there are. count: how many to draw of them, at most all; None: all.
    """
    return _eval_rows(np.random.RandomState(seed), rows, count)


def draw_demonstrations(
    rows: int, train_rows: int, demonstrations: int, seed: int, count: int | None = None
) -> np.ndarray:
    """Return indices (E, K) of the training rows that are shown before each row of `draw_eval_rows`.

    They are drawn from a pool of 2,048 training rows, or of all if there are fewer, without repetition
    within a prompt. rows, seed, count: as for `draw_eval_rows`. Raises UserError if there are too few
    training rows.
    """
    _check_enough(demonstrations, train_rows)
    generator = np.random.RandomState(seed)
    eval_rows = _eval_rows(generator, rows, count)
    pool = generator.choice(train_rows, min(POOL_SIZE, train_rows), replace=False)
    draws = random.Random(seed)
    chosen = [draws.sample(range(len(pool)), demonstrations) for _ in eval_rows]
    return pool[np.array(chosen, np.int64).reshape(len(eval_rows), demonstrations)]


def nearest_demonstrations(queries: np.ndarray, candidates: np.ndarray, demonstrations: int) -> np.ndarray:
    """Return indices (E, K) of the candidates nearest to each query, the most similar last (RICES).

    Similarity is the cosine of feature vectors (Yang et al., 2022, arXiv:2109.05014; Flamingo, appendix A.2).
    Of equally similar candidates, the first counts as the nearest.

    queries: features (E, D) of the images to evaluate. candidates: features (T, D) of training images. Raises
    UserError if there are too few candidates, and for features that are zero or not finite.
    """
    _check_enough(demonstrations, len(candidates))
    queries, candidates = _unit_length(queries, "queries"), _unit_length(candidates, "candidates")
    size = max(1, SIMILARITIES_AT_ONCE // len(candidates))
    parts = [
        _nearest(queries[start : start + size] @ candidates.T, demonstrations)
        for start in range(0, len(queries), size)
    ]
    return np.concatenate(parts) if parts else np.empty((0, demonstrations), np.int64)


def with_shuffled_answers(demonstrations: Sequence[Example], seed: int | str) -> list[Example]:
    """Return the demonstrations with their answers permuted among them; images and questions stay.

    As many as possible get another answer than their own. A model that answers as well with these does not
    use what the demonstrations say about their images.
    """
    answers = [example.references[0] for example in demonstrations]
    rng, order, distinct = random.Random(seed), [*range(len(answers))], sorted({*answers})
    rng.shuffle(order)
    rng.shuffle(distinct)
    order.sort(key=lambda index: distinct.index(answers[index]))  # equal answers together
    # Rotating by the size of the largest group of equal answers moves each group off itself.
    shift = max(Counter(answers).values(), default=0)
    given = dict(zip(order, [answers[index] for index in order[shift:] + order[:shift]], strict=True))
    return [replace(example, references=(given[index],)) for index, example in enumerate(demonstrations)]


def vote_of(demonstrations: Sequence[Example], labels: Sequence[str] = ()) -> Ranked:
    """Return the most frequent answer of the demonstrations, of equally frequent ones the latest.

    A baseline without a model: it shows how much of a score comes from the choice of demonstrations alone.
    labels: the answers to rank; by default those of the demonstrations.
    """
    answers = [example.references[0] for example in demonstrations]
    votes = {answer: answers.count(answer) + place / len(answers) for place, answer in enumerate(answers)}
    return Ranked({label: votes.get(label, 0.0) for label in labels} if labels else votes)


def _eval_rows(generator: np.random.RandomState, rows: int, count: int | None) -> np.ndarray:
    drawn = generator.choice(rows, rows if count is None else min(count, rows), replace=False)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(SAMPLER_SEED))
    return drawn[order.numpy()]


def _check_enough(demonstrations: int, train_rows: int) -> None:
    if not 1 <= demonstrations <= train_rows:
        available = plural(train_rows, "training row")
        raise UserError(f"shots: must be 1 to {available}, got {demonstrations}; correct it")


def _unit_length(features: np.ndarray, name: str) -> np.ndarray:
    lengths = np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(wrong):
        raise UserError(
            f"{name}: the features of row {wrong[0]} have length {lengths[wrong[0], 0]:g}; compute them again"
        )
    return features / lengths


def _nearest(similarities: np.ndarray, count: int) -> np.ndarray:
    """Return the columns (E, K) of the largest similarities (E, T), the largest last."""
    return np.array([_nearest_in_row(row, count) for row in similarities]).reshape(-1, count)


def _nearest_in_row(similarities: np.ndarray, count: int) -> np.ndarray:
    # A partition finds the few largest of many without sorting all.
    threshold = np.partition(similarities, -count)[-count]
    above = np.flatnonzero(similarities > threshold)
    level = np.flatnonzero(similarities == threshold)[: count - len(above)]
    nearest = np.sort(np.concatenate([above, level]))
    return nearest[np.argsort(-similarities[nearest], kind="stable")][::-1]
