"""What trains, declared once: optimizer, counts, saving and loading all ask here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flamingo_ft.config import TrainableSection
from flamingo_ft.model import FlamingoForConditionalGeneration

# Part of the recipe's `trainable` section -> where its parameters live in the model.
PARTS = {"perceiver": "perceiver.", "cross_attention": "gated_cross_attn_layers.", "new_tokens": "token_rows."}
DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


def set_trainable(model: FlamingoForConditionalGeneration, trainable: TrainableSection) -> None:
    """Freeze everything, then let the declared parts train in their declared dtype; gates stay in float32."""
    model.requires_grad_(False)
    parts = tuple(prefix for part, prefix in PARTS.items() if getattr(trainable, part))
    for name, parameter in model.named_parameters():
        if name.startswith(parts):
            dtype = torch.float32 if name.endswith("_gate") else DTYPES[trainable.dtype]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def bridge_tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """What an adapter holds: the whole bridge, trained or not, by name."""
    prefixes = tuple(PARTS.values())
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
