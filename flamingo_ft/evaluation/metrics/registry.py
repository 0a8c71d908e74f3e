"""The registered metrics by name, and the names that a metric must not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flamingo_ft.config import tables
from flamingo_ft.config.metric_names import LOSS, result_key
from flamingo_ft.errors import UserError

from .anls import ANLS
from .boxes import IOU, IOU_50
from .captions import CAPTION_METRICS
from .classification import F1, MACRO_F1, ROC_AUC, TOP_5
from .exact_match import ACCURACY
from .metric import Metric
from .user_metric import user_metric
from .vqa import VQA_ACCURACY

BUILT_IN = (ACCURACY, VQA_ACCURACY, ANLS, *CAPTION_METRICS, F1, MACRO_F1, ROC_AUC, TOP_5, IOU, IOU_50)
MERGE_METRIC = ACCURACY  # `flamingo-ft merge --accuracy-margin` replaces the merge_margin of this metric
USER_METRICS_KEY = "user_metrics"  # lists the keys of users' metrics in a record of results

# Suffixes that turn a metric's name into keys of metrics.json, merge.json and the log.
KEY_SUFFIXES = (
    "",
    "_before",
    "_shuffled_images",
    "_blank_images",
    "_majority",
    "_interval",
    "_drop",
    "_drop_standard_error",
    "_margin",
)
# Names that a metric must not use: other keys of these records, and the report's other figures.
RESERVED_KEYS = frozenset(
    {"before", "shuffled_images", "blank_images", "majority", "samples", "free_text", "classes", "predicted"}
    | {"verdict", "advice", "rows", "per_task", "step", USER_METRICS_KEY}
    | {"image_loss_gap", "image_loss_gap_standard_error", "image_loss_gap_samples", "loss_by_kind", "pairs"}
    | {"label_tokens", "answers", "loss", "loss_increase", "loss_increase_standard_error"}
    | {"margin", "worse"}
    | {"entropy", "mean_token_accuracy", "num_tokens"}  # TRL's, in the log
    | {"reward", "reward_margin", "reward_accuracy"}
    | {"gates", "gates_by_layer", "learning_rate", "gradient_norm"}
    | {"throughput", "memory"}
)

METRICS: dict[str, Metric] = {}


def register_metric(metric: Metric) -> None:
    """Add a metric to the registry and to the values of ``eval.metrics`` and ``eval.metric``.

    Raises ValueError if the name is registered already, or if keys derived from it are in use.
    """
    if metric.name in METRICS or metric.name == LOSS:
        raise ValueError(f"metric {metric.name!r} is already registered; choose another name")
    if collisions := _collisions(metric.name, METRICS):
        raise ValueError(
            f"metric {metric.name!r}: keys of its results are in use ({', '.join(collisions)}); "
            "choose another name"
        )
    METRICS[metric.name] = metric
    tables.METRIC_DESCRIPTIONS.setdefault(metric.name, metric.description or metric.label)


def _collisions(name: str, others: Iterable[str]) -> list[str]:
    """Return the keys of a metric's results that are reserved or those of other metrics."""
    return sorted(_keys(name) & RESERVED_KEYS.union(*map(_keys, others)))


def _keys(name: str) -> set[str]:
    """Return every key under which results of a metric are stored."""
    return {f"{name}{suffix}" for suffix in KEY_SUFFIXES}


def find_metrics(names: Iterable[str]) -> list[Metric]:
    """Return the metrics of these names, each once. ``FILE.py:function`` is a user's metric.

    Raises UserError if a user's function is called like another metric.
    """
    metrics: dict[str, Metric] = {}
    for name in dict.fromkeys(names):
        if name in METRICS:
            metrics[name] = METRICS[name]
            continue
        key = result_key(name)
        if key in metrics or _collisions(key, METRICS):
            raise UserError(f"{name}: {key} is the name of other results; rename the function")
        metrics[key] = user_metric(name)
    return list(metrics.values())


def metrics_in(record: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics that a record of metrics.json or merge.json has values of, users' metrics last."""
    registered = [metric for name, metric in METRICS.items() if record.get(name) is not None]
    users = [name for name in record.get(USER_METRICS_KEY, ()) if record.get(name) is not None]
    return registered + [user_metric(name) for name in users]


def user_metrics_record(metrics: Iterable[Metric]) -> dict[str, list[str]]:
    """Return the entry of a record that names its users' metrics; nothing without any."""
    users = [metric.name for metric in metrics if metric.name not in METRICS]
    return {USER_METRICS_KEY: users} if users else {}


for _metric in BUILT_IN:
    register_metric(_metric)
