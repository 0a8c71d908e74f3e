"""The same held-out questions, asked at several times of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flamingo_ft import processes
from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.evaluation.metrics import evaluate_metrics
from flamingo_ft.evaluation.questions import Question, questions_of
from flamingo_ft.evaluation.results import Results
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.sharding import is_sharded
from flamingo_ft.progress import Bars

from .out_of_memory import oom_as_user_error


class Examination:
    """Asks the questions of ``held_out``; ``results`` has what was answered each time."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        held_out: Sequence[Sample],
        recipe: Recipe,
        progress: Bars,
    ):
        self.results = Results(questions_of(held_out))
        self._options = {"batch_size": recipe.eval.batch_size, "max_new_tokens": recipe.eval.max_new_tokens}
        self._predictor = Predictor(model, processor)
        self._progress, self._model = progress, model

    def scores(self) -> dict[str, float]:
        """Answer the held-out questions and forget the answers; return the value of every metric."""
        questions = self.results.questions
        return evaluate_metrics(questions, self._answers("evaluating", questions, stays=False))

    def take(self, name: str, samples: Sequence[Sample]) -> None:
        """Ask about ``samples``, the held-out ones or those with their images exchanged."""
        questions = questions_of(samples)
        if questions:
            self.results.answers[name] = self._answers(f"evaluating, {name.replace('_', ' ')}", questions)

    def _answers(self, told: str, questions: Sequence[Question], stays: bool = True) -> list[str]:
        """In the order of ``questions``, which the processes share out; those of a sharded model run as one."""
        together = is_sharded(self._model)
        mine = questions if together else processes.share(questions)
        bar = self._progress.add_task(told, total=len(mine), note="")
        with oom_as_user_error("evaluation"):
            on_batch = partial(self._progress.advance, bar)
            answers = self._predictor.answer(mine, on_batch=on_batch, **self._options)
        if not stays:
            self._progress.remove_task(bar)
        return answers if together else processes.joined(answers)
