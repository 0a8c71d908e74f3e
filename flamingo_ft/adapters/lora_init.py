"""Initialization of LoRA weights, beyond PEFT's random A and zero B.

- PiSSA (arXiv:2404.02948): A and B are the principal part of the matrix, which is taken out of it.
- LoftQ (arXiv:2310.08659): B A approximates what quantization lost.
- EVA (arXiv:2410.07170): A holds the principal directions of the layer's inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.language import language_folder
from flamingo_ft.backbones.quantization import dequantized_weight, is_quantized, quantization_formats
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import LoraSection
from flamingo_ft.config.tables import LANGUAGE, VISION
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import SafetensorsFolder
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import BRIDGE

from .files import backbone_records
from .init_from import read_bridge_tensors

Batches = Callable[[], Iterable[Mapping[str, Any]]]


def check_lora_init(
    model: FlamingoForConditionalGeneration, lora: LoraSection, targets: Sequence[str]
) -> None:
    """Raise UserError if the weights of ``targets``, or another choice, do not allow the initialization."""
    init = lora.init_lora_weights
    if init == "loftq":
        for name in targets:
            if "4bit" not in quantization_formats(model.get_submodule(name)):
                reason = f"makes up for what 4-bit quantization lost, and {name} is not in 4 bits"
                raise _init_error(init, reason, "quantization: nf4")
    if init != "pissa":
        return
    for name in targets:
        if is_quantized(model.get_submodule(name)):
            reason = f"takes the LoRA weights out of the matrix, and {name} is quantized"
            raise _init_error(init, reason, "quantization: none")
    if model.config.bridge_init is None and any(part in BRIDGE for part in lora.parts):
        reason = "takes the LoRA weights out of the matrix, and a new bridge is saved whole"
        raise _init_error(init, reason, "model.init_from")
    if lora.use_dora or lora.rank_stabilized:
        reason = "is saved as LoRA of twice the rank, which DoRA and rsLoRA would scale differently"
        raise _init_error(init, reason, "neither")


def _init_error(init: str | bool, reason: str, remedy: str) -> UserError:
    return UserError(f"lora.init_lora_weights: {init} {reason}; use {remedy}, or another initialization")


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies, in host RAM, of every A and B by its name in an adapter."""
    return {
        f"{name}.{matrix}.weight": linear.weight.detach().cpu().clone()
        for name, layer in _lora_layers(model).items()
        for matrix in ("lora_A", "lora_B")
        for linear in getattr(layer, matrix).values()
    }


@torch.no_grad()
def init_loftq(model: FlamingoForConditionalGeneration) -> None:
    """Set B A to the best approximation of W - dequantized(W) (LoftQ, algorithm 1 with one step)."""
    unquantized = UnquantizedWeights(model)
    for name, layer in _lora_layers(model).items():
        quantized = dequantized_weight(layer.get_base_layer()).float()
        lost = unquantized[name].to(quantized) - quantized
        for adapter, rank in layer.r.items():
            left, values, right = torch.linalg.svd(lost / layer.scaling[adapter], full_matrices=False)
            root = values[:rank].sqrt()
            _fill(layer.lora_A[adapter], root[:, None] * right[:rank])
            _fill(layer.lora_B[adapter], left[:, :rank] * root)


def _fill(linear: nn.Module, value: Tensor) -> None:
    """Copy ``value`` into A or B; if the rank exceeds the matrix's own, the rest is zero."""
    parameter = linear.get_parameter("weight")
    parameter.zero_()
    parameter[tuple(slice(size) for size in value.shape)] = value.to(parameter)


def eva_directions(
    model: FlamingoForConditionalGeneration, config: LoraConfig, batches: Batches | None
) -> dict[str, Tensor]:
    """Return principal directions (rank, in) of each target's inputs on training batches, by target name.

    Ranks are not redistributed between layers (EVA's rho is 1): each part keeps the rank of its recipe.
    """
    if batches is None:
        raise _init_error("eva", "needs training batches, got none", "default")
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
    """Set every A to its layer's directions; B stays zero."""
    for name, rows in directions.items():
        for linear in cast(LoraLayer, model.get_submodule(name)).lora_A.values():
            _fill(linear, rows[: len(linear.get_parameter("weight"))])


def _rows(inputs: Tensor | tuple) -> Tensor:
    """Flatten a layer's inputs to (rows, in)."""
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return first.flatten(0, -2).float()


class UnquantizedWeights:
    """The unquantized matrices (out, in) of a quantized model by layer name, read when needed."""

    def __init__(self, model: FlamingoForConditionalGeneration):
        self._model = model
        self._sources = backbone_records(model.config)

    def __getitem__(self, name: str) -> Tensor:
        if name.startswith(LANGUAGE.prefix):
            return self._language_matrix(name)
        if name.startswith(VISION.prefix):
            return self._tower.get_parameter(name.removeprefix(VISION.prefix) + ".weight")
        return self._bridge[f"{name}.weight"]

    def _language_matrix(self, name: str) -> Tensor:
        with SafetensorsFolder(self._language_folder) as files:
            matrix = files[name.removeprefix(LANGUAGE.prefix) + ".weight"]
        base = cast(LoraLayer, self._model.get_submodule(name)).get_base_layer()
        original_class = getattr(base, "source_cls", type(base))  # transformers records what it replaced
        return matrix.T if original_class is Conv1D else matrix  # GPT-2's Conv1D has (in, out)

    @cached_property
    def _language_folder(self) -> Path:
        return language_folder(self._sources["language"]["name"], self._sources["language"]["revision"])

    @cached_property
    def _tower(self) -> nn.Module:
        source = self._sources["vision"]
        visual = load_vision(source["name"], source["pretrained"], source["revision"]).visual
        unfuse_attention(visual)
        return visual

    @cached_property
    def _bridge(self) -> dict[str, Tensor]:
        record = self._model.config.bridge_init or {}
        return read_bridge_tensors(fetch_model(record["path"]))
