"""A model made ready to train: what is frozen in few bits, what gets LoRA, what trains."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig

from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.config import Recipe
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration

from .files import read_lora_config
from .initialise import Batches
from .load import put_lora, quantize_frozen_bridge
from .lora import add_lora
from .start import starting_lora
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
    earlier = starting_lora(recipe.model.init_from)
    # Updates that go on start where they ended, whatever they started from.
    lora = recipe.lora.model_copy(update={"init_lora_weights": "default"}) if earlier else recipe.lora
    config = add_lora(model, lora, batches)
    if earlier:
        _check_same_lora(recipe.model.init_from, config)
        put_lora(model, earlier)
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
