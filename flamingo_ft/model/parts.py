"""Which parameter belongs to which part of the model, by its name and the table of parts (`config.tables`).

The trainable set, optimizer groups, adapters, the memory plan and the model card all use these functions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flamingo_ft.backbones.quantization import cast_in_range
from flamingo_ft.config.tables import BACKBONE_PARTS, BRIDGE_PARTS, Part

PARTS: dict[str, Part] = {part.name: part for part in (*BACKBONE_PARTS, *BRIDGE_PARTS)}
BRIDGE: dict[str, Part] = {part.name: part for part in BRIDGE_PARTS}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # of any library: timm's derive from these
ATTENTION_GATE = "attn_gate"
GATES = "gates"  # the attention gates; feed-forward gates learn with the rest of their blocks
LORA = "lora"  # all LoRA weights share one optimizer group, whichever part they adapt
LORA_B = "lora_b"  # of these, the ones that LoRA+ gives a higher learning rate
OPTIMIZER_GROUPS = (*BRIDGE, GATES, LORA, LORA_B)
RAISED_BY_LORA_PLUS = (".lora_B.", ".lora_magnitude_vector.")  # the same parameters as in PEFT
ATTENTION_MATRICES = (".to_q.weight", ".to_kv.weight", ".to_out.weight")  # of the perceiver and the blocks


def part_of(name: str) -> Part:
    """Return the part of the parameter ``name``; LoRA weights belong to the part that they adapt."""
    return next(part for part in PARTS.values() if name.startswith(part.prefix))


def in_parts(name: str, parts: Iterable[str]) -> bool:
    """Return whether the parameter ``name`` belongs to one of the parts named in ``parts``."""
    return name.startswith(tuple(PARTS[part].prefix for part in parts))


def in_bridge(name: str) -> bool:
    """Return whether the parameter ``name`` belongs to the bridge."""
    return in_parts(name, BRIDGE)


def is_lora(name: str) -> bool:
    """Return whether the parameter ``name`` is a LoRA weight."""
    return ".lora_" in name


def is_gate(name: str) -> bool:
    """Return whether the parameter ``name`` is a gate (``attn_gate``, ``ff_gate``).

    Gates stay in float32: 16 bits round small steps away.
    """
    return name.endswith("_gate")


def cast_parameter(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Cast a parameter, unless it is a gate, which stays in float32, or quantized.

    Raises UserError for a value beyond the range of ``dtype``.
    """
    if parameter.is_floating_point():
        parameter.data = cast_in_range(name, parameter.data, parameter_dtype(name, dtype))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter as `cast_parameter` does, one at a time."""
    for name, parameter in model.named_parameters():
        cast_parameter(name, parameter, dtype)


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter as `cast_parameter` does, and the statistics of batch norms.

    Other buffers, such as the frequencies of rotary embeddings, keep their dtype.
    """
    cast_parameters(model, dtype)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):  # torch wants its statistics in the dtype of its weight
            module.to(dtype)


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the parameter ``name`` in a model of ``dtype``: gates stay in float32."""
    return torch.float32 if is_gate(name) else dtype


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_group(name: str) -> str:
    """Return the optimizer group of the trainable parameter ``name``, one of `OPTIMIZER_GROUPS`."""
    if name.endswith(ATTENTION_GATE):
        return GATES
    if not is_lora(name):
        return part_of(name).name
    return LORA_B if any(kind in name for kind in RAISED_BY_LORA_PLUS) else LORA


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to weight matrices, but not to vectors, embeddings and latents."""
    if parameter.dim() < 2:
        return False
    part = part_of(name)
    inside = name.removeprefix(part.prefix)
    return is_lora(name) or (part.decays and not inside.startswith(part.undecayed))


def is_orthogonalized(name: str) -> bool:
    """Return whether Muon may update the parameter ``name``: an attention matrix of the bridge.

    With Muon on the feed-forward layers too, new bridges learned more slowly in their first 500 samples.
    """
    return in_bridge(name) and name.endswith(ATTENTION_MATRICES)
