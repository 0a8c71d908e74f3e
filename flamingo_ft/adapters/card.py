"""The README.md of an adapter: what it is, what it belongs to, how to use it, what it reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from flamingo_ft import __version__
from flamingo_ft.model import FlamingoForConditionalGeneration

from .contents import adapter_tensors, kept_parts
from .lora import has_lora

CARD = "README.md"
PART_NAMES = {
    "perceiver": "the perceiver resampler",
    "cross_attention": "the gated cross-attention",
    "new_tokens": "the embedding rows of the new tokens",
}


def write_card(
    model: FlamingoForConditionalGeneration, folder: Path, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Write the card; ``evaluation`` is the ``eval`` part of ``metrics.json``, where there is one."""
    environment = Environment(loader=PackageLoader("flamingo_ft.adapters", ""), undefined=StrictUndefined)
    text = environment.get_template("card.md.jinja").render(
        version=__version__,
        vision=model.config.backbones["vision"],
        language=model.config.backbones["language"],
        config=model.config,
        contents=", ".join(_contents(model)),
        parameters=sum(tensor.numel() for tensor in _tensors(model)),
        kept_in=lambda source: (source.get("quantization") or {}).get("format", "full"),
        evaluation=evaluation and _complete(evaluation),
        percent=lambda share: "" if share is None else f"{100 * share:.1f} %",
    )
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def _tensors(model: FlamingoForConditionalGeneration) -> Iterable[Tensor]:
    """What is in the folder that the card describes."""
    return model.parameters() if model.config.merged else adapter_tensors(model).values()


def _contents(model: FlamingoForConditionalGeneration) -> list[str]:
    """What the adapter holds, in words."""
    parts = [PART_NAMES[part] for part in kept_parts(model.config)]
    return parts + (["LoRA"] if has_lora(model) else [])


def _complete(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """With None for what was not measured."""
    per_task = {task: {"before": None, "shuffled_images": None, **found} for task, found in evaluation["per_task"].items()}
    return {"accuracy_before": None, "accuracy_shuffled_images": None, **evaluation, "per_task": per_task}
