"""Ask a model the examples of a task: few-shot prompts, the answers, and the controls beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

from flamingo_ft.data.feature_store import cache_folder
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import Prediction, Ranked
from flamingo_ft.evaluation.questions import Question, with_gray_images, with_other_images
from flamingo_ft.evaluation.results import AFTER, BLANK, SHUFFLED
from flamingo_ft.inference.predictor import Predictor

from .demonstrations import (
    count_demonstrations,
    draw_demonstrations,
    draw_eval_rows,
    nearest_demonstrations,
    vote_of,
    with_shuffled_answers,
)
from .features import image_features
from .images import check_images
from .prompts import chat_prompt, few_shot_prompt
from .task import Example, Task

SHUFFLED_DEMONSTRATIONS, VOTE = "shuffled_demonstrations", "demonstrations_vote"
CONTROLS = {
    SHUFFLED: "with another image",
    BLANK: "with a gray image",
    SHUFFLED_DEMONSTRATIONS: "with the answers of the demonstrations shuffled",
    VOTE: "majority of the demonstrations",
}
Choice = Literal["random", "rices"]
Form = Literal["chunks", "chat"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Protocol:
    """How the examples of a task are asked.

    shots: demonstrations before each example; 0: two without their images, as OpenFlamingo has it. seed: of
    the choice of examples and demonstrations. choice: of demonstrations, at random or the nearest by the
    tower's features (RICES). form: chunks, as OpenFlamingo is evaluated, or turns of a chat; a chat with 0
    shots has no demonstrations. max_samples: examples to ask; None: all.
    """

    shots: int = 0
    seed: int = 0
    choice: Choice = "random"
    form: Form = "chunks"
    max_samples: int | None = None


@dataclass(frozen=True)
class Asked:
    """Examples in the order of asking, each with its demonstrations."""

    examples: Sequence[Example]
    demonstrations: Sequence[Sequence[Example]]


def prepare(
    predictor: Predictor,
    task: Task,
    data: str | Path,
    protocol: Protocol,
    *,
    cache: Path | None = None,
    on_batch: Progress = lambda count: None,
) -> Asked:
    """Read the files of a task and choose examples and their demonstrations.

    cache: folder of image features; by default the user's `cache_folder`. on_batch: called with the number of
    images whose features are there. Raises UserError for files that are not as published, for missing images,
    and for shots of a task without training rows.
    """
    folder = task.open(data)
    every = task.eval_examples(folder)
    rows = draw_eval_rows(len(every), protocol.seed, protocol.max_samples)
    examples = [every[row] for row in rows]
    if not _has_demonstrations(task, protocol):
        check_images(examples)
        return Asked(examples, [()] * len(examples))
    train = task.train_examples(folder)
    count = count_demonstrations(protocol.shots)
    if protocol.choice == "rices":
        chosen = _nearest(predictor, examples, train, count, cache or cache_folder("features"), on_batch)
    else:
        chosen = draw_demonstrations(len(every), len(train), count, protocol.seed, protocol.max_samples)
    demonstrations = [[train[number] for number in numbers] for numbers in chosen]
    check_images([*examples, *(shown for several in demonstrations for shown in several)])
    return Asked(examples, demonstrations)


def questions_of_task(task: Task, asked: Asked, protocol: Protocol) -> list[Question]:
    """Return the prompts with their reference answers."""
    write = few_shot_prompt if protocol.form == "chunks" else chat_prompt
    questions = []
    for example, shown in zip(asked.examples, asked.demonstrations, strict=True):
        prompt = write(task, example, shown, show_images=protocol.shots > 0)
        answer, *others = example.references
        questions.append(
            Question(
                prompt.messages, prompt.images, example.where, answer, example.category or task.name,
                other_answers=tuple(others),
            )
        )  # fmt: skip
    return questions


def answers_of_task(
    predictor: Predictor,
    task: Task,
    asked: Asked,
    questions: Sequence[Question],
    *,
    batch_size: int | None = None,
    on_batch: Progress = lambda count: None,
) -> list[Prediction]:
    """Return the answers: generated and cut, or the labels with their log-likelihoods per token."""
    if not task.ranks_labels:
        texts = predictor.answer(questions, batch_size=batch_size, on_batch=on_batch, **task.decoding)
        return [task.cut(text) for text in texts]
    predictions: list[Prediction] = [""] * len(questions)
    labels_of = [example.labels for example in asked.examples]
    order = sorted(range(len(questions)), key=labels_of.__getitem__)
    for labels, group in groupby(order, key=labels_of.__getitem__):
        indices = list(group)
        scores = predictor.rank(
            [questions[index] for index in indices], labels, with_end=False, per_token=True,
            batch_size=batch_size, on_batch=on_batch,
        )  # fmt: skip
        for index, row in zip(indices, scores.tolist(), strict=True):
            predictions[index] = Ranked(dict(zip(labels, row, strict=True)))
    return predictions


@dataclass(frozen=True)
class TaskAnswers:
    """The answers to the questions of a task by condition, and the examples per second of the first one."""

    task: Task
    protocol: Protocol
    asked: Asked
    questions: Sequence[Question]
    answers: dict[str, list[Prediction]]
    samples_per_second: float


def run_task(
    predictor: Predictor,
    task: Task,
    asked: Asked,
    protocol: Protocol,
    controls: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    on_batch: Progress = lambda count: None,
) -> TaskAnswers:
    """Ask the examples, and again under each of ``controls``, names of `CONTROLS`.

    on_batch: called with the number of finished prompts, of `1 + len(controls)` times the examples.
    """
    questions = questions_of_task(task, asked, protocol)
    start, answers = time.perf_counter(), {}
    answers[AFTER] = answers_of_task(
        predictor, task, asked, questions, batch_size=batch_size, on_batch=on_batch
    )
    seconds = time.perf_counter() - start
    for name, changed in _controls(asked, protocol, controls):
        changed_questions = questions_of_task(task, changed, protocol)
        answers[name] = answers_of_task(
            predictor, task, changed, changed_questions, batch_size=batch_size, on_batch=on_batch
        )
    if VOTE in controls:
        answers[VOTE] = _votes(task, asked)
        on_batch(len(questions))
    return TaskAnswers(task, protocol, asked, questions, answers, len(questions) / seconds)


def controls_of(asked: Asked) -> list[str]:
    """Return the controls that can change anything: those of images, and of demonstrations."""
    names = [SHUFFLED, BLANK] if any(example.images for example in asked.examples) else []
    most = max(map(len, asked.demonstrations), default=0)
    return [*names, *([SHUFFLED_DEMONSTRATIONS] if most > 1 else []), *([VOTE] if most else [])]


def _controls(asked: Asked, protocol: Protocol, names: Sequence[str]) -> Iterator[tuple[str, Asked]]:
    for name in names:
        if name == SHUFFLED:
            yield name, replace(asked, examples=with_other_images(asked.examples, protocol.seed))
        elif name == BLANK:
            yield name, replace(asked, examples=with_gray_images(asked.examples))
        elif name == SHUFFLED_DEMONSTRATIONS:
            shuffled = [
                with_shuffled_answers(shown, f"{protocol.seed}-{number}")
                for number, shown in enumerate(asked.demonstrations)
            ]
            yield name, replace(asked, demonstrations=shuffled)


def _votes(task: Task, asked: Asked) -> list[Prediction]:
    pairs = zip(asked.examples, asked.demonstrations, strict=True)
    if task.ranks_labels:
        return [vote_of(shown, example.labels) for example, shown in pairs]
    return [str(vote_of(shown)) for _, shown in pairs]


def _has_demonstrations(task: Task, protocol: Protocol) -> bool:
    """Whether examples come after demonstrations. Raises UserError for shots without training rows."""
    if task.train_split is None:
        if protocol.shots:
            raise UserError(
                f"{task.name}: has no training rows to draw demonstrations from, got {protocol.shots} shots; "
                "set shots to 0"
            )
        return False
    return protocol.form == "chunks" or protocol.shots > 0


def _nearest(
    predictor: Predictor,
    examples: Sequence[Example],
    train: Sequence[Example],
    count: int,
    cache: Path,
    on_batch: Progress,
) -> Sequence[Sequence[int]]:
    """Return the training rows nearest to each example by the features of their first images."""
    with_images = [number for number, example in enumerate(train) if example.images]
    if not with_images or not all(example.images for example in examples):
        raise UserError("demonstrations: rices compares images, but some rows have none; use random")
    check_images([*examples, *train])
    queries = image_features(predictor, [example.images[0] for example in examples], cache, on_batch)
    candidates = image_features(predictor, [train[n].images[0] for n in with_images], cache, on_batch)
    nearest = nearest_demonstrations(queries, candidates, count)
    return [[with_images[number] for number in numbers] for numbers in nearest.tolist()]
