"""Vision towers of today under their own names, in small.

The architecture is that of the name, with all its options, image size and patch size included; width and
depth are tiny, and the weights are random, in the place of the released ones on a local Hub.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.factory import _MODEL_CONFIGS
from safetensors.torch import save_file
from timm.models import _registry, save_for_hf

from flamingo_ft.backbones.tower_source import hub_repository
from tests.hub_folders import put
from tests.hub_server import Hub

TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TINY_TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}


@dataclass(frozen=True)
class PublishedTower:
    """A released tower: its name and tag in a recipe, and what makes timm's architecture of it small.

    tokens, width: V and D of the tiny tower; V is that of the released one.
    """

    name: str
    pretrained: str | None
    tokens: int
    width: int = 32
    timm_name: str | None = None
    tiny: dict[str, Any] = field(default_factory=lambda: TINY_VIT)

    def __str__(self) -> str:
        return self.name.removeprefix("timm/")


TOWERS = (
    PublishedTower("ViT-L-14", "openai", 256),
    PublishedTower("ViT-SO400M-14-SigLIP-384", "webli", 729, timm_name="vit_so400m_patch14_siglip_384"),
    PublishedTower("ViT-SO400M-16-SigLIP2-384", "webli", 576, timm_name="vit_so400m_patch16_siglip_384"),
    PublishedTower("PE-Core-L-14-336", "meta", 576, timm_name="vit_pe_core_large_patch14_336"),
    PublishedTower("ViT-H-14-378-quickgelu", "dfn5b", 729),
    PublishedTower(
        "EVA02-L-14-336", "merged2b_s6b_b61k", 576, timm_name="eva02_large_patch14_clip_336"
    ),
    PublishedTower(
        "timm/vit_large_patch16_dinov3.lvd1689m", None, 256, timm_name="vit_large_patch16_dinov3"
    ),
    PublishedTower(
        "convnext_large_d_320", "laion2b_s29b_b131k_ft_soup", 100, timm_name="convnext_large",
        tiny={"dims": [8, 16, 24, 32], "depths": [1] * 4},
    ),
)  # fmt: skip


def put_in_small(tower: PublishedTower, patch: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    """Make the tower's name mean a tiny tower while ``patch`` lasts, and put its weights on the Hub."""
    if tower.timm_name is not None:
        build = _registry._model_entrypoints[tower.timm_name]
        patch.setitem(_registry._model_entrypoints, tower.timm_name, _smaller(build, tower.tiny))
    folder.mkdir()
    torch.manual_seed(0)
    if tower.name.startswith("timm/"):
        model = timm.create_model(str(tower.timm_name))
        save_for_hf(model, folder, safe_serialization=True)
    else:
        patch.setitem(_MODEL_CONFIGS, tower.name, _small_config(tower))
        weights = open_clip.create_model(tower.name).state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / "open_clip_model.safetensors")
    put(hub, str(hub_repository(tower.name, tower.pretrained)), folder)


def _smaller(build: Callable[..., Any], tiny: dict[str, Any]) -> Callable[..., Any]:
    return partial(build, **tiny)


def _small_config(tower: PublishedTower) -> dict[str, Any]:
    config = copy.deepcopy(_MODEL_CONFIGS[tower.name])
    config["embed_dim"] = 32
    config["text_cfg"] = TINY_TEXT
    if tower.timm_name is None:
        config["vision_cfg"] |= {"layers": 2, "width": 32, "head_width": 16}
    return config
