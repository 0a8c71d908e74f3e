"""The unquantized matrices of a model whose matrices are quantized, each read when asked for from where it came."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.language import language_folder
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.safetensors_folder import SafetensorsFolder
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration

from .start import bridge_at
from .trainable import PREFIXES


class Originals:
    """From a layer's name in the model to its matrix (out, in) before quantization."""

    def __init__(self, model: FlamingoForConditionalGeneration):
        self._model = model
        self._sources = model.config.backbones

    def __getitem__(self, name: str) -> Tensor:
        if name.startswith(PREFIXES["language"]):
            return self._of_language(name)
        if name.startswith(PREFIXES["vision"]):
            return self._tower.get_submodule(name.removeprefix(PREFIXES["vision"])).weight
        return self._bridge[f"{name}.weight"]

    def _of_language(self, name: str) -> Tensor:
        with SafetensorsFolder(self._folder) as files:
            matrix = files[name.removeprefix(PREFIXES["language"]) + ".weight"]
        base = self._model.get_submodule(name).get_base_layer()
        was = getattr(base, "source_cls", type(base))  # what transformers put the quantized layer in place of
        return matrix.T if was is Conv1D else matrix  # GPT-2 keeps its matrices the other way round

    @cached_property
    def _folder(self) -> Path:
        return language_folder(self._sources["language"]["name"], self._sources["language"]["revision"])

    @cached_property
    def _tower(self) -> nn.Module:
        source = self._sources["vision"]
        visual = load_vision(source["name"], source["pretrained"], source["revision"]).visual
        unfuse_attention(visual)
        return visual

    @cached_property
    def _bridge(self) -> dict[str, Tensor]:
        return bridge_at(fetch_model(self._model.config.bridge_init["path"]))
