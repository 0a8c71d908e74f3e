"""Vision towers from timm: build one, or load one from a folder with timm's config.json and weights."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from flamingo_ft.backbones.compat import TimmModel

TIMM_KEY = "timm"  # in the configuration of a tower that is timm's own and not a part of an OpenCLIP model


class TimmTower(TimmModel):
    """A timm image model without its classifier, with the methods of OpenCLIP's wrapper around such models.

    OpenCLIP's constructor cannot pass arguments to timm or take a model that is already built.
    """

    def __init__(self, trunk: nn.Module, image_size: tuple[int, int]):
        nn.Module.__init__(self)
        self.trunk = trunk
        self.head = nn.Sequential()
        self.image_size = image_size


def is_timm(config: dict) -> bool:
    """Return whether a `VisionBackbone.config` is of a timm model, not of an OpenCLIP tower."""
    return TIMM_KEY in config


def build_timm_tower(config: dict) -> TimmTower:
    """Build the timm model of a `VisionBackbone.config` with random weights and without its classifier.

    It is first built with the classifier, as when it is loaded: some models have other heads without one.
    """
    options = config[TIMM_KEY]
    trunk = timm.create_model(
        config["vision_cfg"]["timm_model_name"],
        pretrained_cfg=options["pretrained_cfg"],
        **options["model_args"],
    )
    return _without_classifier(trunk)


def load_timm_tower(name: str) -> TimmTower:
    """Load the timm model ``local-dir:FOLDER`` in float32, without its classifier.

    Raises what timm and torch raise for weights that do not fit config.json.
    """
    return _without_classifier(timm.create_model(name, pretrained=True))


def _without_classifier(trunk: Any) -> TimmTower:
    trunk.reset_classifier(0)
    height, width = trunk.pretrained_cfg["input_size"][1:]
    return TimmTower(trunk, (height, width))
