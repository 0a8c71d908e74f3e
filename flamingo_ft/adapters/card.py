"""The card (README.md) of an adapter or a merged model: what it is, its base, how to use it, its scores.

It is rendered from the files in the folder; what is not there is left out.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from flamingo_ft.backbones.tower_source import hub_repository
from flamingo_ft.config import METRICS_FILE, PREDICTIONS_FILE, RECIPE_FILE
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.config.yaml_document import parse
from flamingo_ft.formatting import one_line
from flamingo_ft.hub.names import BACKBONE_KEYS, NAME, strip_local_paths
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, MODEL_SAFETENSORS
from flamingo_ft.model import FlamingoConfig
from flamingo_ft.model.parts import BRIDGE
from flamingo_ft.templates import load_template
from flamingo_ft.version import __version__

from .files import backbone_records, parts_in_adapter, read_flamingo_config, read_lora_config

CARD = "README.md"
COMPARISON_FILE = "comparison.json"
"""Tables of the card by what was evaluated, which `evaluation.card.write_comparison` writes."""
UNNAMED = "flamingo"  # not the folder's name: copies of an adapter have the same card
FIGURES = {
    "loss.png": "Training loss",
    "loss_by_kind.png": "Held-out loss with and without images",
    "gates.png": "Gates by training step",
}
MAX_SAMPLES = 5  # predictions in the card
TASK = "image-text-to-text"


@dataclass(frozen=True)
class CardTable:
    """The scores of one metric, ready to be written; `flamingo_ft.evaluation.results.card_tables` makes them.

    title: heading of the table. description: what the metric measures. hub_type: its identifier on the Hub.
    columns: headers of the scores. rows: task, number of questions and scores as text. values: overall
    (``all``) and per task, for the Hub.
    """

    title: str
    description: str
    hub_type: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    values: Mapping[str, float]


@dataclass(frozen=True)
class TextTable:
    """A table as text: variants of the model on the same questions (`evaluation.variant_tables`), or a run's
    losses and stages (`evaluation.run_tables`).

    columns: headers; the first is that of what a row is about.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_card(
    folder: Path,
    metrics: Mapping[str, Any] | None = None,
    license: str | None = None,
    tables: Sequence[CardTable] = (),
    run_tables: Sequence[TextTable] = (),
) -> None:
    """Write the card.

    Args:
        metrics: content of ``metrics.json``, if it is not written yet.
        tables: scores to show.
        run_tables: losses and stages of the run to show.
    """
    text = card_text(folder, None, license, metrics, tables, run_tables)
    (folder / CARD).write_text(text, encoding="utf-8")


def card_text(
    folder: Path,
    name: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    tables: Sequence[CardTable] = (),
    run_tables: Sequence[TextTable] = (),
) -> str:
    """Return the card of the adapter or model in ``folder``.

    Args:
        name: of its repository on the Hub, if it is pushed.
    """
    config = read_flamingo_config(folder)
    metrics = metrics or _read_json(folder / METRICS_FILE) or {}
    recipe, backbones = _read_recipe(folder), backbone_records(config)
    text = load_template("adapters/card.md.jinja", filters={"cell": _cell}).render(
        version=__version__,
        name=name or "this/folder",
        vision=strip_local_paths(backbones["vision"], BACKBONE_KEYS),
        language=strip_local_paths(backbones["language"], BACKBONE_KEYS),
        licenses={"vision": None, "language": None} | (config.licenses or {}),
        config=config,
        bridge=strip_local_paths(config.bridge_init),
        contents=", ".join(_contents(folder, config)),
        parameters=_count_parameters(folder),
        precision=lambda source: (source.get("quantization") or {}).get("format", "full"),
        recipe=recipe and yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        training=metrics.get("train"),
        losses=_losses(folder),
        tables=tables,
        run_tables=run_tables,
        comparisons=_read_json(folder / COMPARISON_FILE) or {},
        verdict=(metrics.get("eval") or {}).get("verdict"),
        figures={file: title for file, title in FIGURES.items() if (folder / "figures" / file).is_file()},
        samples=_samples(folder),
    )
    head = metadata(config, recipe, tables, license, (name or UNNAMED).rpartition("/")[2])
    return f"---\n{head}\n---\n{text}\n"


def _contents(folder: Path, config: FlamingoConfig) -> list[str]:
    """Return labels of what the adapter holds."""
    if config.merged or not (folder / ADAPTER_WEIGHTS).is_file():
        return []
    labels = {name: f"the {part.label}" for name, part in BRIDGE.items()}
    options = config.perceiver or {}
    if options.get("depth") == 0:  # what is left of it without layers
        has_positions = any(options.get(f"max_{of}") for of in ("num_media", "num_frames", "tiles"))
        labels["perceiver"] = (
            f"the layer norm{' and positions' if has_positions else ''} of the visual tokens"
        )
    parts = [labels[part] for part in parts_in_adapter(config)]
    return parts + (["LoRA"] if read_lora_config(folder) is not None else [])


def _count_parameters(folder: Path) -> int:
    """Count the parameters in the folder's weight files, from their headers."""
    total = 0
    adapter = folder / ADAPTER_WEIGHTS
    for file in [adapter] if adapter.is_file() else sorted(folder.glob(MODEL_SAFETENSORS)):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in list(tensors.keys()))
    return total


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line]


def _read_recipe(folder: Path) -> dict[str, Any] | None:
    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    return strip_recipe_paths(parse(path.read_text(encoding="utf-8"), str(path)).values)


def _losses(folder: Path) -> tuple[float, float] | None:
    """Return the first and the last logged loss."""
    losses = [entry["loss"] for entry in _read_lines(folder / "log.jsonl") if "loss" in entry]
    return (losses[0], losses[-1]) if losses else None


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Return the first predictions with an answer after training."""
    rows = [row for row in _read_lines(folder / PREDICTIONS_FILE) if row.get("after") is not None]
    return [{"before": None, **row} for row in rows[:MAX_SAMPLES]]


def _cell(text: str | None) -> str:
    """Escape text for a cell of a Markdown table."""
    return html.escape(one_line(text or ""), quote=False).replace("|", "\\|").replace("*", "\\*")


def metadata(
    config: FlamingoConfig,
    recipe: Mapping[str, Any] | None,
    tables: Sequence[CardTable],
    license: str | None,
    name: str,
) -> str:
    """Return the card's metadata as YAML. It names only models and datasets on the Hub."""
    sources = _datasets(recipe, "train"), _datasets(recipe, "eval")
    data = ModelCardData(
        base_model=base_models(config) or None,
        datasets=[*dict.fromkeys([*sources[0], *sources[1]])] or None,
        eval_results=_results(tables, sources[1]),
        library_name="transformers" if config.merged else "peft",
        license=license,
        model_name=name if tables else None,
        pipeline_tag=TASK,
        tags=["flamingo_ft", "flamingo"],
        base_model_relation=("finetune" if config.merged else "adapter") if base_models(config) else None,
    )
    return data.to_yaml()


def base_models(config: FlamingoConfig) -> list[str]:
    """Return the names of language model and tower on the Hub, if they have one."""
    backbones = backbone_records(config)
    language, vision = backbones["language"], backbones["vision"]
    on_hub = language["name"] if language.get("revision") and NAME.fullmatch(language["name"]) else None
    return [name for name in (on_hub, hub_repository(vision["name"], vision.get("pretrained"))) if name]


def _datasets(recipe: Mapping[str, Any] | None, split: str) -> list[str]:
    """Return the Hub datasets of a split, those of stages first."""
    runs = [*((recipe or {}).get("stages") or ()), recipe or {}]
    entries = [entry for run in runs for entry in (run.get("data") or {}).get(split) or ()]
    return list(dict.fromkeys(entry["hub"] for entry in entries if entry.get("hub")))


def _results(tables: Sequence[CardTable], datasets: list[str]) -> list[EvalResult] | None:
    """Every metric over all samples, and of each task if there are several."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=datasets[0] if len(datasets) == 1 else "held-out",
            dataset_name="held-out samples",
            metric_type=table.hub_type,
            metric_value=round(value, 4),
            metric_name=f"{table.description} ({task})",
        )
        for table in tables
        for task, value in table.values.items()
    ] or None
