"""What a recipe may name as a metric: a registered one, or a function in a user's Python file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticKnownError

from flamingo_ft.config.section import PathKind
from flamingo_ft.config.tables import METRIC_DESCRIPTIONS
from flamingo_ft.errors import UserError

LOSS = "loss"  # the value of `eval.metric` that needs no generated answers
USER_METRIC = "FILE.py:function"
_USER_METRIC = re.compile(r"(.+\.py):([A-Za-z_]\w*)", re.DOTALL)
_SCHEMA_PATTERN = r"\.py:[A-Za-z_]\w*$"


def split_user_metric(name: str) -> tuple[str | None, str]:
    """Return file and function of ``FILE.py:function``; None as the file for the name of a metric."""
    match = _USER_METRIC.fullmatch(name)
    return (None, name) if match is None else (match[1], match[2])


def is_user_metric(name: str) -> bool:
    """Whether a name is ``FILE.py:function``."""
    return _USER_METRIC.fullmatch(name) is not None


def result_key(name: str) -> str:
    """Return the key under which a metric's results are stored: a user's metric has its function's name."""
    return split_user_metric(name)[1]


def describe_choices(names: Iterable[str]) -> str:
    """Return the names that are allowed, for an error message."""
    return f"{', '.join(map(repr, names))} or {USER_METRIC}"


def parse_metric(name: str) -> str:
    """Return the name of a metric that scores answers, as a recipe has it: with the path made absolute.

    Raises UserError for a name that is not known.
    """
    if is_user_metric(name):
        return str(Path(name).expanduser().absolute())
    known = answer_metric_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        remedy = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"metric: must be {describe_choices(known)}, got {name!r}{remedy}")
    return name


def _check_metric(name: str) -> str:
    return _check(name, METRIC_DESCRIPTIONS)


def _check_answer_metric(name: str) -> str:
    return _check(name, answer_metric_names())


def _check(name: str, known: Iterable[str]) -> str:
    if name in known or is_user_metric(name):
        return name
    raise PydanticKnownError("literal_error", {"expected": describe_choices(known)})


def answer_metric_names() -> list[str]:
    """Return the names of the metrics that score answers."""
    return [name for name in METRIC_DESCRIPTIONS if name != LOSS]


def metric_schema(names: Iterable[str]) -> dict[str, object]:
    """Return the JSON schema of one of these names, or of a function in a user's file."""
    function = {"type": "string", "format": USER_METRIC, "pattern": _SCHEMA_PATTERN}
    return {"anyOf": [{"enum": [*names]}, function]}


MetricName = Annotated[
    str,
    AfterValidator(_check_metric),
    Field(json_schema_extra=metric_schema(METRIC_DESCRIPTIONS)),
    PathKind.METRIC,
]
AnswerMetricName = Annotated[
    str,
    AfterValidator(_check_answer_metric),
    Field(json_schema_extra=metric_schema(answer_metric_names())),
    PathKind.METRIC,
]
