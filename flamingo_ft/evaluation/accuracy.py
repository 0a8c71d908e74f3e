"""Exact-match accuracy of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flamingo_ft.inference.answer import answer_batch
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .questions import Question, as_row


def normalise(text: str) -> str:
    """What counts of an answer: its words, without case, outer spaces and final punctuation."""
    return " ".join(text.casefold().split()).rstrip(".!? ")


def is_right(question: Question, said: str) -> bool:
    """Whether ``said`` is the question's answer, word for word."""
    return normalise(said) == normalise(question.answer)


def answer_questions(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The model's greedy answers in the order of the questions; ``advance`` hears of each batch done.

    Questions of like length are answered together, to spend little on padding.
    """
    training, answers = model.training, [""] * len(questions)
    model.eval()
    sizes = [(len(question.images), len(str(question.messages))) for question in questions]
    order = sorted(range(len(questions)), key=sizes.__getitem__)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [as_row(questions[i]) for i in batch]
        for i, said in zip(batch, answer_batch(model, processor, rows, max_new_tokens), strict=True):
            answers[i] = said
        advance(len(batch))
    model.train(training)
    return answers


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of right answers."""
    return sum(map(is_right, questions, answers)) / len(questions)
