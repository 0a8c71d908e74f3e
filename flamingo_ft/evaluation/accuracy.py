"""Exact-match accuracy of generated answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from flamingo_ft.data.samples import Sample
from flamingo_ft.inference.answer import answer_batch
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .questions import Question, as_row, questions_of


def normalise(text: str) -> str:
    """What counts of an answer: its words, without case, outer spaces and final punctuation."""
    return " ".join(text.casefold().split()).rstrip(".!?")


def answer_questions(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The model's answers in the order of the questions; ``advance`` hears of each batch done.

    Questions of like length are answered together, which changes nothing but the time.
    """
    training, answers = model.training, [""] * len(questions)
    model.eval()
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(str(questions[i].messages))))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [as_row(questions[i]) for i in batch]
        for i, said in zip(batch, answer_batch(model, processor, rows, max_new_tokens), strict=True):
            answers[i] = said
        advance(len(batch))
    model.train(training)
    return answers


def accuracy_by_task(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of right answers and number of questions, per task and under ``all`` for all of them."""
    right = defaultdict(list)
    for question, said in zip(questions, answers, strict=True):
        correct = normalise(said) == normalise(question.answer)
        right[question.task].append(correct)
        right["all"].append(correct)
    return {task: {"accuracy": sum(hits) / len(hits), "questions": len(hits)} for task, hits in right.items()}


def evaluate(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """`accuracy_by_task` of the model's answers to ``samples``."""
    questions = questions_of(samples)
    answers = answer_questions(model, processor, questions, batch_size, max_new_tokens, advance)
    return accuracy_by_task(questions, answers)
