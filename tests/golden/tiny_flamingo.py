"""This package's Flamingo on the tiny backbones, with the weights that OpenFlamingo had."""

from __future__ import annotations

from torch import nn

from flamingo_ft.model import Flamingo
from tests.golden.deterministic_weights import fill
from tests.golden.tiny_models import EOC_TOKEN, MEDIA_TOKEN, WIDTH, tiny_clip, tiny_language_model

PARTS = ("vision_encoder", "perceiver", "gated_cross_attn_layers", "lang_encoder")


def untrained_flamingo(family: str, every: int, **options: object) -> Flamingo:
    """Return a Flamingo with deterministic backbones and the bridge as initialized."""
    clip, language_model = tiny_clip(), tiny_language_model(family)
    return Flamingo(
        clip,
        language_model,
        EOC_TOKEN,
        MEDIA_TOKEN,
        vis_dim=WIDTH,
        cross_attn_every_n_layers=every,
        **options,
    ).eval()


def flamingo(family: str, every: int, **options: object) -> Flamingo:
    """Return a Flamingo with deterministic weights."""
    model = untrained_flamingo(family, every, **options)
    fill(model.perceiver, "perceiver.")
    fill(model.gated_cross_attn_layers, "gated_cross_attn_layers.")
    return model


def shared_parameters(model: Flamingo) -> dict[str, nn.Parameter]:
    """Return every parameter by the name under which it was recorded."""
    return {f"{part}.{name}": p for part in PARTS for name, p in getattr(model, part).named_parameters()}
