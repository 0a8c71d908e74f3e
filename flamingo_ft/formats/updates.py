"""LoRA as earlier versions of PEFT named it inside a language model that they had wrapped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# PEFT before 0.3 kept ``lora_A.weight``, since then ``lora_A.default.weight``; since 0.6 what is updated is a ``base_layer``.
_UPDATE = re.compile(r"\.lora_(?P<which>[AB])(\.\w+)?\.weight$")
_WRAPPER = re.compile(r"^lang_encoder\.base_model\.model\.")
SETTINGS = (
    "tuning_config"  # where Multimodal-GPT keeps rank and alpha; Otter: lora_config in its configuration
)


def without_wrapper(name: str) -> str:
    """A name without what PEFT put before and into it."""
    return _WRAPPER.sub("lang_encoder.", name).replace(".base_layer.", ".")


def is_update(name: str) -> bool:
    """Whether this is an update's matrix."""
    return ".lora_" in name


def plain(name: str) -> str:
    """The name as PEFT keeps it in a file, without the adapter's own."""
    return _UPDATE.sub(r".lora_\g<which>.weight", name)


def alpha_of(beside: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """lora_alpha, where the checkpoint tells it."""
    settings = beside.get(SETTINGS) or config.get("lora_config") or {}
    settings = settings.get(SETTINGS, settings) if isinstance(settings, Mapping) else {}
    found = settings.get("lora_alpha")
    return float(found) if isinstance(found, (int, float)) else None
