"""A user's own metric: a function in a Python file, ``mine.py:shouting``.

    def shouting(prediction: str, references: list[str]) -> float:
        return float(prediction.isupper())

The value of the metric is the mean over the questions; larger values are better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FunctionType, ModuleType

from flamingo_ft.config.metric_names import result_key, split_user_metric
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message, shorten

from .metric import Metric, per_pair

UserFunction = Callable[[str, list[str]], float]
MAX_ANSWER_CHARACTERS = 60  # of an answer in a message


def user_metric(name: str) -> Metric:
    """Return the metric of ``FILE.py:function``. The file is run when the metric is first computed."""
    key = result_key(name)
    return Metric(
        key, per_pair(_UserScore(name)), label=key, description=f"{key}, a metric of the user", format=_number
    )


def _number(value: float) -> str:
    return f"{value:.4g}"


class _UserScore:
    """Calls a user's function and checks what it returns. name: ``FILE.py:function``."""

    def __init__(self, name: str):
        self.name = name

    @cached_property
    def function(self) -> UserFunction:
        """The user's function. Raises UserError if the file cannot be run or has no such function."""
        file, function_name = split_user_metric(self.name)
        if file is None or not Path(file).is_file():
            raise UserError(
                f"{self.name}: no such file; correct the path, or name other metrics in eval.metrics"
            )
        module = self._run(Path(file))
        function = getattr(module, function_name, None)
        if not callable(function):
            defined = [name for name, value in vars(module).items() if isinstance(value, FunctionType)]
            raise UserError(f"{self.name}: no function {function_name}, got {', '.join(defined) or 'none'}")
        return function

    def _run(self, file: Path) -> ModuleType:
        spec = spec_from_file_location(f"flamingo_ft_user_metric_{file.stem}", file)
        assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
        module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's file raises is an error of the user's file
            raise UserError(
                f"{self.name}: the file cannot be run, got {type(error).__name__}: {error_message(error)}"
            ) from error
        return module

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        """Return the user's score of a prediction. Raises UserError if it fails or is not a finite number."""
        answer = shorten(prediction, MAX_ANSWER_CHARACTERS)
        try:
            score = self.function(prediction, list(references))
        except UserError:
            raise
        except Exception as error:  # whatever the user's function raises is an error of the user's function
            raise UserError(
                f"{self.name}: failed on the answer {answer!r}, "
                f"got {type(error).__name__}: {error_message(error)}; correct the function"
            ) from error
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{self.name}: must return a finite number, "
                f"got {shorten(repr(score), MAX_ANSWER_CHARACTERS)} for the answer {answer!r}"
            )
        return number
