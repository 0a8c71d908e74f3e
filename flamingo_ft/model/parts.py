"""Which parameter belongs to which part of the model, by its name and the table of parts (`config.tables`).

The trainable set, optimizer groups, adapters, the memory plan and the model card all use these functions.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from flamingo_ft.config.tables import BACKBONE_PARTS, BRIDGE_PARTS, Part

PARTS: dict[str, Part] = {part.name: part for part in (*BACKBONE_PARTS, *BRIDGE_PARTS)}
BRIDGE: dict[str, Part] = {part.name: part for part in BRIDGE_PARTS}
LORA = "lora"  # all LoRA weights are one group of the optimizer, whatever part they belong to
OPTIMIZER_GROUPS = (*BRIDGE, LORA)


def part_of(name: str) -> Part:
    """Return the part of the parameter ``name``; LoRA weights belong to the part that they adapt."""
    return next(part for part in PARTS.values() if name.startswith(part.prefix))


def in_parts(name: str, parts: Iterable[str]) -> bool:
    """Whether the parameter ``name`` belongs to one of ``parts``, by name."""
    return name.startswith(tuple(PARTS[part].prefix for part in parts))


def in_bridge(name: str) -> bool:
    """Whether the parameter ``name`` belongs to the bridge."""
    return in_parts(name, BRIDGE)


def is_lora(name: str) -> bool:
    """Whether the parameter ``name`` is a LoRA weight."""
    return ".lora_" in name


def is_gate(name: str) -> bool:
    """Whether the parameter ``name`` is a gate; gates stay in float32: 16 bits round small steps away."""
    return name.endswith("_gate")


def optimizer_group(name: str) -> str:
    """Return the optimizer group of the trainable parameter ``name``, one of `OPTIMIZER_GROUPS`."""
    return LORA if is_lora(name) else part_of(name).name


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices of weights, but not to vectors, embeddings and latents."""
    if parameter.dim() < 2:
        return False
    part = part_of(name)
    inside = name.removeprefix(part.prefix)
    return is_lora(name) or (part.decays and not inside.startswith(part.undecayed))
