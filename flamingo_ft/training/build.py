"""From a recipe to a model that is ready to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from flamingo_ft.adapters import init_bridge, prepare_training
from flamingo_ft.backbones.device import default_device
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import Recipe
from flamingo_ft.data.render import apply_template
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo

# From the model and its processor to some training batches.
SomeBatches = Callable[[FlamingoForConditionalGeneration, FlamingoProcessor], Iterable[Mapping[str, Any]]]


def build_model(
    recipe: Recipe, some_batches: SomeBatches | None = None
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The recipe's backbones with a bridge, new from its seed or the one to start from, and LoRA; what shall train does.

    some_batches: for the one initialisation of LoRA that looks at data.
    """
    wanted, device = recipe.model, default_device()
    vision = load_vision(
        wanted.vision.name,
        wanted.vision.pretrained,
        quantization=Quantization.of(wanted.vision, shardable=recipe.train.fsdp),
        device=device,
        image_size=wanted.vision.image_size,
        resize_mode=wanted.vision.resize_mode,
    )
    language = load_language(
        wanted.language.name,
        wanted.language.revision,
        quantization=Quantization.of(wanted.language, shardable=recipe.train.fsdp),
        device=device,
    )
    torch.manual_seed(recipe.train.seed)
    model, processor = build_flamingo(
        vision,
        language,
        cross_attn_every_n_layers=wanted.cross_attn_every_n_layers,
        media_visibility=wanted.media_visibility,
        perceiver=wanted.perceiver.model_dump(),
        cross_attention=wanted.cross_attention.model_dump(),
        decoder_layers_attr_name=wanted.language.decoder_layers_attr_name,
    )
    apply_template(processor, recipe.data)
    processor.image_processor.video_frames = recipe.data.video_frames
    if wanted.init_from is not None:
        init_bridge(model, wanted.init_from)
    model.to(device)
    prepare_training(model, recipe, some_batches and partial(some_batches, model, processor))
    return model, processor
