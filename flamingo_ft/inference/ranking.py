"""Scores of given answers: the log-likelihood of each label after a prompt.

The prompt is read once. Labels are then read along a trie of their tokens, one level at a time, so that a
beginning that labels share is scored once.

Shapes: B prompts, R rows of text (B times inner nodes), N nodes of a level, V vocabulary, K labels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.conditioning import select_rows
from flamingo_ft.model.language_model_inputs import get_cache

MAX_ROWS = 128  # copies of the prompts' key/value caches that are held at once


@torch.no_grad()
def score_answers(
    model: FlamingoForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    media: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Return the log-likelihood (B, K) of each answer's tokens after each prompt, in nats, on the CPU.

    prompts: token ids (B, T) of one length, so that there is no padding. media: as for the model's forward.
    """
    reading = _read(model, prompts, media)
    scores = reading.log_probabilities.new_zeros(len(prompts), len(answers))
    order = sorted(range(len(answers)), key=lambda number: list(answers[number]))  # alike ones together
    size = max(1, MAX_ROWS // len(prompts))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        scores[:, part] = _scores_along(model, reading, trie_levels([answers[number] for number in part]))
    return scores.cpu()


def check_labels(labels: Sequence[str]) -> None:
    """Raise UserError unless there are labels, each with a text of its own."""
    if not labels:
        raise UserError("labels: got none; give at least one")
    seen = set()
    for label in labels:
        if not label.strip():
            raise UserError(f"labels: got a blank one, {label!r}; write its text")
        if label in seen:
            raise UserError(f"labels: got {label!r} twice; remove one")
        seen.add(label)


@dataclass
class Level:
    """The nodes of a trie at one depth: each a token after its parent, an inner node of the level before.

    inner: the nodes that have children. ends: nodes, each with the number of a sequence that ends there.
    """

    parents: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    inner: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)


def trie_levels(sequences: Sequence[Sequence[int]]) -> list[Level]:
    """Return the trie of token sequences; its root is the one inner node before the first level."""
    levels: list[Level] = []
    above: dict[tuple[int, ...], int] = {(): 0}  # the inner nodes of the level before, by their tokens
    for depth in range(max(map(len, sequences))):
        level, nodes = Level(), {}
        for number, sequence in enumerate(sequences):
            if len(sequence) <= depth:
                continue
            key = tuple(sequence[: depth + 1])
            if key not in nodes:
                nodes[key] = len(nodes)
                level.parents.append(above[key[:-1]])
                level.tokens.append(key[-1])
            if len(sequence) == depth + 1:
                level.ends.append((nodes[key], number))
        has_children = {tuple(sequence[: depth + 1]) for sequence in sequences if len(sequence) > depth + 1}
        inner = [key for key in nodes if key in has_children]
        level.inner = [nodes[key] for key in inner]
        above = {key: number for number, key in enumerate(inner)}
        levels.append(level)
    return levels


@dataclass(frozen=True)
class _Reading:
    """What follows a text: the log-probabilities (R, V) of the next token, and the cache of what was read."""

    log_probabilities: Tensor
    cache: Any


def _read(
    model: FlamingoForConditionalGeneration,
    ids: Sequence[Sequence[int]],
    media: Mapping[str, Tensor],
    cache: Any = None,
) -> _Reading:
    """Read texts (R, T) of one length, after those in ``cache``."""
    inputs = {name: tensor.to(model.device) for name, tensor in media.items()}
    if "logits_to_keep" in inspect.signature(model.lang_encoder.forward).parameters:
        inputs["logits_to_keep"] = 1  # pyrefly: ignore[unsupported-operation]
    tokens = torch.tensor(ids, device=model.device)
    output = model(input_ids=tokens, cache=cache, use_cache=True, **inputs)
    return _Reading(output.logits[:, -1].float().log_softmax(-1), get_cache(output))


def _scores_along(
    model: FlamingoForConditionalGeneration, reading: _Reading, levels: Sequence[Level]
) -> Tensor:
    """Return the log-likelihood (B, K) of each of the K paths of a trie, given what follows the prompts."""
    count = len(reading.log_probabilities)
    scores = reading.log_probabilities.new_zeros(count, sum(len(level.ends) for level in levels))
    so_far = reading.log_probabilities.new_zeros(count, 1)  # of the inner nodes of the level before
    if len(levels) > 1:
        reading = replace(reading, cache=copy.deepcopy(reading.cache))  # other answers need it as it is
    for level in levels:
        next_tokens = reading.log_probabilities.unflatten(0, (count, -1))
        nodes = so_far[:, level.parents] + next_tokens[:, level.parents, level.tokens]
        for node, answer in level.ends:
            scores[:, answer] = nodes[:, node]
        if level.inner:
            so_far, above = nodes[:, level.inner], next_tokens.shape[1]
            rows = [row * above + level.parents[node] for row in range(count) for node in level.inner]
            select_rows(reading.cache, torch.tensor(rows, device=so_far.device))
            tokens = [[level.tokens[node]] for _ in range(count) for node in level.inner]
            reading = _read(model, tokens, {}, reading.cache)
    return scores
