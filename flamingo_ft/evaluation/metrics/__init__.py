"""Metrics that score answers against reference answers: a registry, and a file for each kind.

To add one, such as the share of answers with the right first word:

1. Write its score in a file of this folder, and a `Metric` from it:

       def first_word(prediction: str, references: Sequence[str]) -> float:
           return float(prediction.split()[:1] in [reference.split()[:1] for reference in references])

       FIRST_WORD = Metric("first_word", per_pair(first_word), label="first word")

   A corpus metric, whose value is not the mean of scores, gives its ``statistics``, an array with a row for
   each prediction, and an ``aggregate``, from rows to the value.
2. Add it to `BUILT_IN` in ``registry.py``.
3. Add ``"first_word": "what it measures; higher is better"`` to ``METRIC_DESCRIPTIONS`` in
   `flamingo_ft/config/tables.py`, from which the recipe schema is generated.
4. Regenerate the two files that list it::

       flamingo-ft recipes schema > recipes/recipe.schema.json &&
       flamingo-ft recipes keys --markdown > recipes/README.md

A run whose recipe names it in ``eval.metrics`` logs it as ``eval_first_word``; metrics.json, tables, figures,
the report and the model card show it, and ``eval.metric: first_word`` selects the best checkpoint by it.
"""

from .boxes import IOU, IOU_50
from .exact_match import ACCURACY, exact_match, normalize
from .metric import Metric, Prediction, Ranked, References, capitalized, mean, per_pair
from .registry import (
    KEY_SUFFIXES,
    MERGE_METRIC,
    METRICS,
    RESERVED_KEYS,
    find_metrics,
    metrics_in,
    register_metric,
    user_metrics_record,
)

__all__ = [
    "ACCURACY",
    "IOU",
    "IOU_50",
    "KEY_SUFFIXES",
    "MERGE_METRIC",
    "METRICS",
    "RESERVED_KEYS",
    "Metric",
    "Prediction",
    "Ranked",
    "References",
    "capitalized",
    "exact_match",
    "find_metrics",
    "mean",
    "metrics_in",
    "normalize",
    "per_pair",
    "register_metric",
    "user_metrics_record",
]
