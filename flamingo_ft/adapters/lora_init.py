"""What LoRA updates start from, beyond PEFT's random A and zero B.

PiSSA (arXiv:2404.02948) moves the principal part of a matrix into its update; LoftQ (arXiv:2310.08659) starts the update
at what quantization lost; EVA (arXiv:2410.07170) takes A from the principal directions of what the layer reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.language import language_folder
from flamingo_ft.backbones.quantization import dequantized_weight, is_quantized, quantization_formats
from flamingo_ft.backbones.safetensors_folder import SafetensorsFolder
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import LoraSection
from flamingo_ft.config.tables import LANGUAGE, VISION
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import BRIDGE

from .init_from import read_bridge_tensors

Batches = Callable[[], Iterable[Mapping[str, Any]]]


def check_lora_init(model: nn.Module, lora: LoraSection, targets: Sequence[str]) -> None:
    """Refuse an initialisation that the weights, or another choice, do not allow."""
    how = lora.init_lora_weights
    quantized = [name for name in targets if is_quantized(model.get_submodule(name))]
    if how == "pissa" and quantized:
        raise _refusal(
            how, f"takes its start out of the weights, and {quantized[0]} is quantized", "quantization: none"
        )
    if how == "pissa" and model.config.bridge_init is None and any(part in BRIDGE for part in lora.parts):
        raise _refusal(
            how, "takes its start out of the weights, and those of a fresh bridge are kept", "model.init_from"
        )
    if how == "pissa" and (lora.use_dora or lora.use_rslora):
        raise _refusal(
            how, "is kept as a LoRA of twice the rank, which DoRA and rsLoRA would scale anew", "neither"
        )
    if how == "loftq":
        plain = [name for name in targets if "4bit" not in quantization_formats(model.get_submodule(name))]
        if plain:
            raise _refusal(
                how, f"makes up for what 4 bits lost, and {plain[0]} is not kept in 4", "quantization: nf4"
            )


def _refusal(how: str, reason: str, remedy: str) -> UserError:
    return UserError(f"lora.init_lora_weights: {how} {reason}; use {remedy}, or another initialisation")


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, in the computer's memory, of every A and B by its name in an adapter."""
    return {
        f"{name}.{matrix}.weight": weights.weight.detach().cpu().clone()
        for name, layer in _lora_layers(model).items()
        for matrix in ("lora_A", "lora_B")
        for weights in getattr(layer, matrix).values()
    }


@torch.no_grad()
def init_loftq(model: FlamingoForConditionalGeneration) -> None:
    """The best update of each rank to W - dequantized(W) (LoftQ, algorithm 1 with one step)."""
    originals = UnquantizedWeights(model)
    for name, layer in _lora_layers(model).items():
        kept = dequantized_weight(layer.get_base_layer()).float()
        lost = originals[name].to(kept) - kept
        for adapter, rank in layer.r.items():
            left, values, right = torch.linalg.svd(lost / layer.scaling[adapter], full_matrices=False)
            root = values[:rank].sqrt()
            _fill(layer.lora_A[adapter].weight, root[:, None] * right[:rank])
            _fill(layer.lora_B[adapter].weight, left[:, :rank] * root)


def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy; a rank beyond the matrix's own leaves the rest at zero."""
    parameter.zero_()
    parameter[tuple(slice(size) for size in value.shape)] = value.to(parameter)


def eva_directions(
    model: FlamingoForConditionalGeneration, config: LoraConfig, batches: Batches | None
) -> dict:
    """The principal directions (rank, in) of what each target of ``config`` reads on training batches, by its name.

    Ranks are not moved between layers (EVA's rho is 1): each part keeps the one it was given.
    """
    if batches is None:
        raise _refusal("eva", "looks at training batches, and there are none here", "default")
    return get_eva_state_dict(
        model,
        list(batches()),
        dataclasses.replace(config, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)),
        forward_fn=lambda model, inputs: model(**inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: _rows(inputs),
        show_progress_bar=False,
    )


@torch.no_grad()
def init_eva(model: nn.Module, directions: Mapping[str, Tensor]) -> None:
    """Let every A start along its layer's directions; B stays at zero."""
    for name, found in directions.items():
        for matrix in model.get_submodule(name).lora_A.values():
            _fill(matrix.weight, found[: len(matrix.weight)])


def _rows(inputs: Tensor | tuple) -> Tensor:
    """What a layer read, as a table (rows, in)."""
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return first.flatten(0, -2).float()


class UnquantizedWeights:
    """From a layer's name in the model to its matrix (out, in) before quantization."""

    def __init__(self, model: FlamingoForConditionalGeneration):
        self._model = model
        self._sources = model.config.backbones

    def __getitem__(self, name: str) -> Tensor:
        if name.startswith(LANGUAGE.prefix):
            return self._of_language(name)
        if name.startswith(VISION.prefix):
            return self._tower.get_submodule(name.removeprefix(VISION.prefix)).weight
        return self._bridge[f"{name}.weight"]

    def _of_language(self, name: str) -> Tensor:
        with SafetensorsFolder(self._folder) as files:
            matrix = files[name.removeprefix(LANGUAGE.prefix) + ".weight"]
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
        return read_bridge_tensors(fetch_model(self._model.config.bridge_init["path"]))
