"""What the probe asks: the questions of a recipe whose answers repeat, with their samples of both splits.

A question is its text, in one task and with one number of images. Wordings of a named task are one question
if they have the same answers: "Which digit is this?" and "Name the digit."
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flamingo_ft.data.sample import UNNAMED_TASK, Medium, message_text
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural

from .metrics import normalize
from .questions import Question
from .reference_answers import is_free_text

MAX_ANSWERS = 20  # of a question with few answers, which gets a linear probe
MIN_SAMPLES_PER_ANSWER = 5  # on average, in training; with fewer, answers are retrieved
MIN_TRAIN_SAMPLES = MIN_EVAL_SAMPLES = 10  # fewer allow no conclusion
MAX_QUESTIONS = 8
MAX_TRAIN_SAMPLES, MAX_EVAL_SAMPLES = 2_000, 1_000  # of a question
SHARED_TRAIN_SAMPLES = 6_000  # of all questions together, shared out evenly
SAME_ANSWERS = 0.5  # overlap (Jaccard) of the answers of two wordings of one question
AGREEMENT = 0.9  # of their answers about the same images

FEW, MANY = "few answers", "many answers"
# Reasons why samples are left out.
NO_IMAGES, FREE_TEXT = "without an image", "with free text that hardly repeats"
TOO_FEW_TRAIN = f"of questions with fewer than {MIN_TRAIN_SAMPLES} training samples"
TOO_FEW_EVAL = f"of questions with fewer than {MIN_EVAL_SAMPLES} held-out samples"
BOXES, ONE_ANSWER = "of questions answered by boxes", "of questions with one answer"
NEW_ANSWERS = "with answers that do not occur in training"
OTHER_QUESTIONS = f"of questions beyond the {MAX_QUESTIONS} with the most held-out samples"
MORE_SAMPLES = "beyond those drawn at random"

Key = tuple[str, str, int]  # task, normalized text, number of images


def question_key(question: Question) -> Key:
    """Return what makes two samples the same question, before wordings are merged."""
    return question.task, normalize(message_text(question.messages[-1])), len(question.images)


@dataclass
class ProbeQuestion:
    """A question with its samples of both splits.

    wordings: its keys, the most frequent first. left_out: number of its samples by reason.
    """

    wordings: list[Key]
    train: list[Question]
    eval: list[Question]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        """Images of each sample."""
        return self.wordings[0][2]

    @property
    def answers(self) -> Counter[str]:
        """Normalized answers, by the number of training samples."""
        return Counter(normalize(question.answer) for question in self.train)

    @property
    def kind(self) -> str:
        """``FEW`` or ``MANY`` answers."""
        distinct = len(self.answers)
        few = distinct <= MAX_ANSWERS and len(self.train) >= MIN_SAMPLES_PER_ANSWER * distinct
        return FEW if few else MANY

    @property
    def obstacle(self) -> str | None:
        """Why the question cannot be probed; None if it can."""
        everything = [*self.train, *self.eval]
        if not self.images:
            return NO_IMAGES
        if all(one.boxes for one in everything):
            return BOXES
        if is_free_text(everything):
            return FREE_TEXT
        if len(self.train) < MIN_TRAIN_SAMPLES:
            return TOO_FEW_TRAIN
        answers = self.answers
        if len(answers) < 2:
            return ONE_ANSWER
        known = sum(normalize(one.answer) in answers for one in self.eval)
        if 2 * known < len(self.eval):
            return NEW_ANSWERS
        return TOO_FEW_EVAL if known < MIN_EVAL_SAMPLES else None

    def drop(self, reason: str, keep: Callable[[Question], bool]) -> None:
        """Leave out the samples of both splits that are not to be kept, then those with new answers."""
        self._drop("train", reason, keep)
        self._drop("eval", reason, keep)
        answers = self.answers
        self._drop("eval", NEW_ANSWERS, lambda one: normalize(one.answer) in answers)

    def _drop(self, split: str, reason: str, keep: Callable[[Question], bool]) -> None:
        samples = getattr(self, split)
        kept = [one for one in samples if keep(one)]
        if len(kept) < len(samples):
            self.left_out[reason] += len(samples) - len(kept)
            setattr(self, split, kept)


@dataclass
class ProbeQuestions:
    """The questions to probe, and the number of all other held-out samples by reason."""

    probed: list[ProbeQuestion]
    left_out: Counter[str]

    def check(self) -> None:
        """Raise UserError if no question can be probed."""
        if self.probed:
            return
        reasons = "; ".join(f"{plural(count, 'sample')} {reason}" for reason, count in self.left_out.items())
        raise UserError(
            f"--probe: got no question that can be probed ({reasons or 'no held-out samples'}); use held-out "
            "questions with images whose short answers occur in training, or leave --probe out"
        )


def choose_questions(train: Iterable[Question], evaluation: Sequence[Question], seed: int) -> ProbeQuestions:
    """Group the samples by question and choose the questions that can be probed.

    seed: decides which samples of a question with many are used.
    """
    by_key, eval_by_key = _by_key(train), _by_key(evaluation)
    left_out: Counter[str] = Counter()
    usable = []
    for wordings in _merge_wordings(by_key, list(eval_by_key)):
        question = ProbeQuestion(
            wordings,
            [one for key in wordings for one in by_key.get(key, ())],
            [one for key in wordings for one in eval_by_key.get(key, ())],
        )
        reason = question.obstacle
        if reason is None:
            usable.append(question)
        elif question.eval:
            left_out[reason] += len(question.eval)
    usable.sort(key=lambda question: -len(question.eval))
    for question in usable[MAX_QUESTIONS:]:
        left_out[OTHER_QUESTIONS] += len(question.eval)
    for question in usable[:MAX_QUESTIONS]:
        _limit(question, len(usable[:MAX_QUESTIONS]), seed)
    return ProbeQuestions(usable[:MAX_QUESTIONS], left_out)


def _by_key(questions: Iterable[Question]) -> dict[Key, list[Question]]:
    by_key = defaultdict(list)
    for question in questions:
        by_key[question_key(question)].append(question)
    return dict(by_key)


def _limit(question: ProbeQuestion, questions: int, seed: int) -> None:
    """Keep a random part of the samples of a question that has many: the same images in every question."""
    most = min(MAX_TRAIN_SAMPLES, SHARED_TRAIN_SAMPLES // questions)
    drawn = {
        id(one)
        for samples, limit in ((question.train, most), (question.eval, MAX_EVAL_SAMPLES))
        for one in _draw(samples, limit, seed)
    }
    question.drop(MORE_SAMPLES, lambda one: id(one) in drawn)


def _draw(samples: list[Question], most: int, seed: int) -> list[Question]:
    """Return at most ``most`` samples, in an order that depends on their first image alone."""
    if len(samples) <= most:
        return samples
    return sorted(samples, key=lambda one: random.Random(f"{seed} {one.images[0]}").random())[:most]


# --- wordings


def _merge_wordings(train: Mapping[Key, Sequence[Question]], evaluated: Sequence[Key]) -> list[list[Key]]:
    """Return the keys of each question, the most frequent in training first.

    Two wordings of a named task are one question if most of their answers are the same and they do not
    disagree about the same images, as "Is there a dog?" and "Is there a cat?" do.
    """
    groups: list[_Wordings] = []
    for key in sorted(train, key=lambda key: -len(train[key])):
        wording = _Wordings([key], *_answers(train[key]))
        group = next((group for group in groups if group.accepts(wording)), None)
        if group is None:
            groups.append(wording)
        else:
            group.add(wording)
    return [group.keys for group in groups] + [[key] for key in evaluated if key not in train]


@dataclass
class _Wordings:
    """Keys of one question, their answers, and the answer about each tuple of images."""

    keys: list[Key]
    answers: set[str]
    by_images: dict[Hashable, str]

    def accepts(self, other: _Wordings) -> bool:
        (task, _, images), (other_task, _, other_images) = self.keys[0], other.keys[0]
        if (task, images) != (other_task, other_images) or task == UNNAMED_TASK:
            return False
        if len(self.answers & other.answers) < SAME_ANSWERS * len(self.answers | other.answers):
            return False
        shared = self.by_images.keys() & other.by_images.keys()
        return sum(self.by_images[i] == other.by_images[i] for i in shared) >= AGREEMENT * len(shared)

    def add(self, other: _Wordings) -> None:
        self.keys += other.keys
        self.answers |= other.answers
        self.by_images = other.by_images | self.by_images


def _answers(samples: Sequence[Question]) -> tuple[set[str], dict[Hashable, str]]:
    by_images: dict[Hashable, str] = {tuple(one.images): normalize(one.answer) for one in samples}
    return {normalize(one.answer) for one in samples}, by_images


def media_of(questions: Iterable[ProbeQuestion]) -> dict[Medium, str]:
    """Return the distinct images and videos of all samples, each with a row that it is from."""
    return {
        medium: sample.where
        for question in questions
        for sample in (*question.train, *question.eval)
        for medium in sample.images
    }
