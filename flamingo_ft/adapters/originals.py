"""The unquantized matrices of a model whose matrices are quantized, read one at a time from where they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.attention import open_attention
from flamingo_ft.backbones.language import language_folder
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.weight_files import WeightFiles
from flamingo_ft.model import FlamingoForConditionalGeneration

from .start import bridge_at
from .trainable import PREFIXES


@contextmanager
def original_weights(model: FlamingoForConditionalGeneration) -> Iterator[Callable[[str], Tensor]]:
    """A function from a layer's name in the model to its matrix (out, in) before quantization."""
    source, config = model.config.backbones, model.config
    vision: dict[str, Any] = {}
    with WeightFiles(language_folder(source["language"]["name"], source["language"]["revision"])) as files:

        def original(name: str) -> Tensor:
            if name.startswith(PREFIXES["language"]):
                matrix = files[name.removeprefix(PREFIXES["language"]) + ".weight"]
                layer = model.get_submodule(name)
                return matrix.T if _class_of(layer) is Conv1D else matrix
            if name.startswith(PREFIXES["vision"]):
                vision.setdefault("tower", _tower(source["vision"]))
                return vision["tower"].get_submodule(name.removeprefix(PREFIXES["vision"])).weight
            return bridge_at(Path(config.bridge_init["path"]))[f"{name}.weight"]

        yield original


def _tower(source: dict[str, Any]):
    visual = load_vision(source["name"], source["pretrained"], source["revision"]).visual
    open_attention(visual)
    return visual


def _class_of(layer) -> type:
    """The class that transformers put a quantized layer in place of: GPT-2 keeps its matrices the other way round."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return getattr(base, "source_cls", type(base))
