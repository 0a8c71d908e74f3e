"""Scores of given answers: the log-likelihood of one answer to each prompt, or of each label to every prompt.

One answer is read together with its prompt. Before labels, the prompt is read once; they are then read along
a trie of their tokens, one level at a time, so that a beginning that labels share is scored once. What is
left of a label when it shares no more, its tail, is read in one forward with other tails.

Shapes: B prompts, R rows of text (B times nodes), T tokens, N nodes of a level, V vocabulary, K labels.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.data.collate import pad_ids
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.conditioning import select_rows
from flamingo_ft.model.language_model_inputs import READS_ONE_TOKEN_AFTER_CACHE, get_cache

MAX_ROWS = 128  # copies of the prompts' key/value caches that are held at once
MAX_TAIL_TOKENS = 512  # tokens of tails whose logits are held at once


@dataclass(frozen=True)
class AnswerScore:
    """How likely an answer is.

    log_likelihood: of the answer and the token that ends it, in nats. tokens: how many tokens these are.
    is_greedy: whether each of them is the likeliest after those before it, as greedy decoding requires.
    """

    log_likelihood: float
    tokens: int
    is_greedy: bool


@torch.no_grad()
def score_pairs(
    model: FlamingoForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    media: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
) -> list[AnswerScore]:
    """Return the score of each answer after the prompt at its index.

    prompts, answers: token ids; answers may be of any length but 0. media: as for the model's forward.
    """
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    inputs = {**pad_ids(texts, pad_token_id, "right"), **media}
    length = inputs["input_ids"].shape[1]
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    # The first token of an answer is predicted by the last of its prompt.
    count = length - min(map(len, prompts)) + 1
    logits = model(**on_device, use_cache=False, **_last_logits(model, count)).logits
    skipped = length - logits.shape[1]
    scores = []
    for prompt, answer, row in zip(prompts, answers, logits, strict=True):
        start = len(prompt) - 1 - skipped
        scores.append(_score(row[start : start + len(answer)], answer))
    return scores


def _score(logits: Tensor, answer: Sequence[int]) -> AnswerScore:
    """Return the score of an answer's tokens, given the logits (T, V) that predict them."""
    tokens = torch.tensor(answer, device=logits.device)
    chosen = logits.double().log_softmax(-1).gather(1, tokens[:, None])
    is_greedy = (logits.argmax(-1) == tokens).all()
    return AnswerScore(float(chosen.sum()), len(answer), bool(is_greedy))


@torch.no_grad()
def score_answers(
    model: FlamingoForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    media: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Return the log-likelihood (B, K) of each answer's tokens after each prompt, in nats, on the CPU.

    prompts: token ids (B, T) of one length, so that there is no padding. media: as for the model's forward.
    The prompts are read once, unless the rows of the language model's cache cannot be selected, as with RWKV.
    """
    reading = _read(model, prompts, media)
    if not hasattr(reading.cache, "reorder_cache"):
        return _score_whole_texts(model, prompts, media, answers)
    scores = reading.log_probabilities.new_zeros(len(prompts), len(answers))
    one_by_one = model.lang_encoder.config.model_type in READS_ONE_TOKEN_AFTER_CACHE
    for part, levels in _narrow_tries(answers, len(prompts), with_tails=not one_by_one):
        scores[:, part] = _scores_along(model, reading, [answers[number] for number in part], levels)
    return scores.cpu()


def _score_whole_texts(
    model: FlamingoForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    media: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """`score_answers` without a cache: every answer is read with its whole prompt."""
    columns = []
    for answer in answers:
        pairs = score_pairs(model, prompts, media, [answer] * len(prompts), pad_token_id=0)  # of one length
        columns.append([score.log_likelihood for score in pairs])
    return torch.tensor(columns).T


def _narrow_tries(
    answers: Sequence[Sequence[int]], count: int, with_tails: bool
) -> Iterator[tuple[list[int], list[Level]]]:
    """Yield tries that need at most `MAX_ROWS` rows for ``count`` prompts, each after its answers."""
    parts = [sorted(range(len(answers)), key=lambda number: list(answers[number]))]
    while parts:
        part = parts.pop()
        levels = trie_levels([answers[number] for number in part], with_tails)
        if len(part) == 1 or count * max(len(level.inner) for level in levels) <= MAX_ROWS:
            yield part, levels
        else:
            middle = len(part) // 2
            parts += part[:middle], part[middle:]


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

    inner: the nodes that several sequences continue. ends: nodes, each with the number of a sequence that
    ends there. tails: nodes, each with the number of the only sequence that continues it.
    """

    parents: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    inner: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    tails: list[tuple[int, int]] = field(default_factory=list)


def trie_levels(sequences: Sequence[Sequence[int]], with_tails: bool = True) -> list[Level]:
    """Return the trie of token sequences; its root is the one inner node before the first level.

    with_tails: otherwise, nodes that one sequence continues are inner nodes too.
    """
    levels: list[Level] = []
    above: dict[tuple[int, ...], int] = {(): 0}  # the inner nodes of the level before, by their tokens
    numbers = list(range(len(sequences)))  # of the sequences that go through them
    while numbers:
        depth, level, continued = len(levels) + 1, Level(), defaultdict(list)
        nodes: dict[tuple[int, ...], int] = {}
        for number in numbers:
            key = tuple(sequences[number][:depth])
            if key not in nodes:
                nodes[key] = len(nodes)
                level.parents.append(above[key[:-1]])
                level.tokens.append(key[-1])
            if len(sequences[number]) == depth:
                level.ends.append((nodes[key], number))
            else:
                continued[key].append(number)
        inner = {key: own for key, own in continued.items() if len(own) > with_tails}
        level.tails = [(nodes[key], own[0]) for key, own in continued.items() if key not in inner]
        level.inner = [nodes[key] for key in inner]
        above = {key: number for number, key in enumerate(inner)}
        numbers = [number for own in inner.values() for number in own]
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
    tokens = torch.tensor(ids, device=model.device)
    output = model(input_ids=tokens, cache=cache, use_cache=True, **inputs, **_last_logits(model, 1))
    return _Reading(output.logits[:, -1].float().log_softmax(-1), get_cache(output))


def _last_logits(model: FlamingoForConditionalGeneration, count: int) -> dict[str, int]:
    """Return the argument with which the language model computes only the last ``count`` logits, if any."""
    has_argument = "logits_to_keep" in inspect.signature(model.lang_encoder.forward).parameters
    return {"logits_to_keep": count} if has_argument else {}


def _scores_along(
    model: FlamingoForConditionalGeneration,
    reading: _Reading,
    answers: Sequence[Sequence[int]],
    levels: Sequence[Level],
) -> Tensor:
    """Return the log-likelihood (B, K) of each answer along their trie, given what follows the prompts."""
    count = len(reading.log_probabilities)
    scores = reading.log_probabilities.new_zeros(count, len(answers))
    so_far = reading.log_probabilities.new_zeros(count, 1)  # of the inner nodes of the level before
    reading = copy.deepcopy(reading)  # other answers need the cache as it is
    for depth, level in enumerate(levels):
        next_tokens = reading.log_probabilities.unflatten(0, (count, -1))
        nodes = so_far[:, level.parents] + next_tokens[:, level.parents, level.tokens]
        for node, number in (*level.ends, *level.tails):
            scores[:, number] = nodes[:, node]
        for nodes_read, numbers in _tails_to_read(level, answers, count):
            branch = copy.deepcopy(reading)
            _branch(branch, count, [level.parents[node] for node in nodes_read])
            tails = [answers[number][depth:] for number in numbers]
            scores[:, numbers] += _read_tails(model, branch.cache, count, tails)
        if level.inner:
            so_far = nodes[:, level.inner]
            _branch(reading, count, [level.parents[node] for node in level.inner])
            tokens = [[level.tokens[node]] for _ in range(count) for node in level.inner]
            reading = _read(model, tokens, {}, reading.cache)
    return scores


def _branch(reading: _Reading, count: int, parents: Sequence[int]) -> None:
    """Replace the rows of the cache, as many for each of ``count`` prompts, by those of ``parents``."""
    above = len(reading.log_probabilities) // count
    rows = [row * above + parent for row in range(count) for parent in parents]
    select_rows(reading.cache, torch.tensor(rows, device=reading.log_probabilities.device))


def _tails_to_read(
    level: Level, answers: Sequence[Sequence[int]], count: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield nodes and answers of a level's tails, few enough to be read together, of similar length."""
    tails = sorted(level.tails, key=lambda tail: len(answers[tail[1]]), reverse=True)
    while tails:
        size = max(1, min(MAX_ROWS, MAX_TAIL_TOKENS // len(answers[tails[0][1]])) // count)
        nodes, numbers = zip(*tails[:size], strict=True)
        yield list(nodes), list(numbers)
        tails = tails[size:]


def _read_tails(
    model: FlamingoForConditionalGeneration, cache: Any, count: int, tails: Sequence[Sequence[int]]
) -> Tensor:
    """Return the log-likelihood (B, N) of N tails without their first tokens, which are read too.

    cache: its rows are what comes before each tail, for each of ``count`` prompts.
    """
    length = max(map(len, tails))
    padded = torch.tensor([[*tail, *[tail[-1]] * (length - len(tail))] for tail in tails])
    known = torch.arange(1, length) < torch.tensor([[len(tail)] for tail in tails])
    padded = padded.repeat(count, 1).to(model.device)
    logits = model(input_ids=padded[:, :-1], cache=cache, use_cache=True).logits
    chosen = logits.float().log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
    chosen = chosen.masked_fill(~known.repeat(count, 1).to(chosen.device), 0.0)
    return chosen.sum(-1).unflatten(0, (count, -1))
