"""From a recipe to a model that is ready to train."""

from __future__ import annotations

import torch

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import Recipe
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.backbones.device import default_device


def build_model(recipe: Recipe) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The recipe's backbones with a new bridge from its seed, the declared parts trainable."""
    wanted = recipe.model
    vision = load_vision(wanted.vision.name, wanted.vision.pretrained)
    language = load_language(wanted.language.name, wanted.language.revision)
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
    set_trainable(model, recipe.trainable)
    return model.to(default_device()), processor
