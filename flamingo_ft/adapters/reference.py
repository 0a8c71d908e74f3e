"""The model before training, kept beside the one that trains, at the price of what trains."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from flamingo_ft.backbones.quantization import is_quantized, shared_quantization_state
from flamingo_ft.model import FlamingoForConditionalGeneration


def frozen_copy(model: FlamingoForConditionalGeneration) -> FlamingoForConditionalGeneration:
    """``model`` as it is now, for evaluation, to stay so while ``model`` trains.

    Modules and hooks are copies. What trains is copied and frozen; all other parameters and buffers, with what quantized
    layers keep beside them, are the model's own tensors. To be made before trainers wrap ``model.forward``.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        kept = nn.Parameter(parameter.detach().clone(), False) if parameter.requires_grad else parameter
        memo[id(parameter)] = kept
    for module in model.modules():
        memo |= shared_quantization_state(module)
    return copy.deepcopy(model, memo).eval()


def answer_alike(reference: nn.Module, training: bool) -> None:
    """Let 8-bit layers compute as those of the policy do: on a CPU, bitsandbytes rounds activations in evaluation alone."""
    for module in reference.modules():
        if is_quantized(module):
            module.train(training)


def drop_nothing(model: nn.Module) -> None:
    """Set to zero the rates at which layers drop units, where transformers keeps them as numbers (OPT, BART, ...); TRL
    sees to modules that do nothing else."""
    for module in model.modules():
        for name, rate in vars(module).items():
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)
