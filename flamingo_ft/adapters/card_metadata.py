"""What the Hub reads of a card: base models, tags, datasets, results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from flamingo_ft.backbones.tower_source import hub_repository
from flamingo_ft.hub.names import NAME
from flamingo_ft.model import FlamingoConfig

TASK = "image-text-to-text"
METRIC = "exact_match"


def metadata(
    config: FlamingoConfig,
    recipe: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    license: str | None,
    name: str,
) -> str:
    """YAML, without the lines around it. Only what is on the Hub is named there."""
    sources = _datasets(recipe, "train"), _datasets(recipe, "eval")
    data = ModelCardData(
        base_model=base_models(config) or None,
        datasets=[*dict.fromkeys([*sources[0], *sources[1]])] or None,
        eval_results=_results(evaluation, sources[1]),
        library_name="transformers" if config.merged else "peft",
        license=license,
        model_name=name if evaluation else None,
        pipeline_tag=TASK,
        tags=["flamingo_ft", "flamingo"],
        base_model_relation=("finetune" if config.merged else "adapter") if base_models(config) else None,
    )
    return data.to_yaml()


def base_models(config: FlamingoConfig) -> list[str]:
    """The Hub's names of language model and tower, where they have one."""
    language, vision = config.backbones["language"], config.backbones["vision"]
    on_hub = language["name"] if language.get("revision") and NAME.fullmatch(language["name"]) else None
    return [name for name in (on_hub, hub_repository(vision["name"], vision.get("pretrained"))) if name]


def _datasets(recipe: Mapping[str, Any] | None, split: str) -> list[str]:
    entries = ((recipe or {}).get("data") or {}).get(split) or []
    return [entry["hub"] for entry in entries if entry.get("hub")]


def _results(evaluation: Mapping[str, Any] | None, datasets: list[str]) -> list[EvalResult] | None:
    """Accuracy over all, and of each task where there are several."""
    if not evaluation:
        return None
    tasks = {task: found["accuracy"] for task, found in evaluation["per_task"].items()}
    measured = {"all": evaluation["accuracy"]} | (tasks if len(tasks) > 1 else {})
    return [_result(name, accuracy, datasets) for name, accuracy in measured.items()]


def _result(task: str, accuracy: float, datasets: list[str]) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=datasets[0] if len(datasets) == 1 else "held-out",
        dataset_name="held-out samples",
        metric_type=METRIC,
        metric_value=round(accuracy, 4),
        metric_name=f"exact match of greedy answers ({task})",
    )
