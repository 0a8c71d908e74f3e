"""Which parameter belongs to which part of the model: the table of parts (`config.tables`), applied to names.

Everything that goes by part asks here: trainable set, optimizer groups, adapters, memory plan, card.
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
    """Return the part that the parameter ``name`` belongs to; LoRA weights belong to the part that they are
    added to.
    """
    return next(part for part in PARTS.values() if name.startswith(part.prefix))


def in_parts(name: str, parts: Iterable[str]) -> bool:
    """Whether the parameter ``name`` belongs to one of ``parts``, by name."""
    return name.startswith(tuple(PARTS[part].prefix for part in parts))


def in_bridge(name: str) -> bool:
    """Whether the parameter ``name`` belongs to the bridge."""
    return in_parts(name, BRIDGE)


def is_lora(name: str) -> bool:
    """Whether ``name`` is that of a LoRA weight."""
    return ".lora_" in name


def is_gate(name: str) -> bool:
    """Whether ``name`` is that of a gate, which stays in float32: its values are too fine for fewer bits."""
    return name.endswith("_gate")


def optimizer_group(name: str) -> str:
    """Return the optimizer group of the trainable parameter ``name``, one of `OPTIMIZER_GROUPS`."""
    return LORA if is_lora(name) else part_of(name).name


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, and not to vectors, embeddings and latents, whose size means
    something.
    """
    if parameter.dim() < 2:
        return False
    part = part_of(name)
    inside = name.removeprefix(part.prefix)
    return is_lora(name) or (part.decays and not inside.startswith(part.undecayed))
