"""A model made ready to train: what is frozen in few bits, what gets LoRA, what trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from flamingo_ft.backbones.quantization import Quantization, is_quantized, shared_quantization_state
from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration

from .files import read_lora_config
from .init_from import lora_to_start_from
from .load import load_lora_weights, quantize_frozen_bridge
from .lora import add_lora
from .lora_init import Batches
from .trainable import set_trainable

# What must be the same for the updates of one LoRA to be those of another.
LORA_SHAPE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")


def prepare_training(
    model: FlamingoForConditionalGeneration, recipe: Recipe, batches: Batches | None = None
) -> None:
    """Quantize the frozen parts of the bridge, add LoRA and let train what the recipe says, in place.

    Where the recipe starts from an adapter with LoRA, its updates are trained on: UserError unless the recipe asks for
    the same.
    """
    set_trainable(model, recipe.trainable)
    if recipe.model.bridge_quantization != "none":
        kept_as = Quantization(
            recipe.model.bridge_quantization, compute_dtype=recipe.model.language.compute_dtype
        )
        model.config.bridge_quantization = kept_as.record()
        quantize_frozen_bridge(model, kept_as)
    earlier = lora_to_start_from(recipe.model.init_from)
    # Updates that go on start where they ended, whatever they started from.
    lora = recipe.lora.model_copy(update={"init_lora_weights": "default"}) if earlier else recipe.lora
    config = add_lora(model, lora, batches)
    if earlier:
        _check_same_lora(recipe.model.init_from, config)
        load_lora_weights(model, earlier)
    set_trainable(model, recipe.trainable, recipe.lora)


def _check_same_lora(start: Path, config: LoraConfig | None) -> None:
    earlier = read_lora_config(fetch_model(start))
    differing = [key for key in LORA_SHAPE if config is None or getattr(config, key) != getattr(earlier, key)]
    if differing:
        found = "none" if config is None else getattr(config, differing[0])
        raise UserError(
            f"model.init_from: {start} has LoRA with {differing[0]} {getattr(earlier, differing[0])}, the recipe {found}; "
            "give the recipe the same lora section, so that it is trained on and not lost (what began as PiSSA has twice "
            "the r and lora_alpha it began with)"
        )


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


def match_training_mode(reference: nn.Module, training: bool) -> None:
    """Let 8-bit layers compute as those of the policy do: on a CPU, bitsandbytes rounds activations in evaluation alone."""
    for module in reference.modules():
        if is_quantized(module):
            module.train(training)


def zero_dropout(model: nn.Module) -> None:
    """Set to zero the rates at which layers drop units, where transformers keeps them as numbers (OPT, BART, ...); TRL
    sees to modules that do nothing else."""
    for module in model.modules():
        for name, rate in vars(module).items():
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)
