"""From an adapter's folder to a working model.

The backbones are loaded by the names that the adapter records, quantized as it records, and must have the content that
it records; so must the bridge that it builds on, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import set_peft_model_state_dict
from torch import Tensor

from flamingo_ft.backbones.device_and_dtype import default_device
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import Quantization, quantize_linears
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import is_whole_model
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.added_tokens import grow_vocabulary
from flamingo_ft.model.parts import BRIDGE, is_lora
from flamingo_ft.model.quantized import mark_quantized
from flamingo_ft.model.sharding import fill, let_go

from .answering import use_greedy_decoding
from .files import (
    read_base_name,
    read_config,
    read_flamingo_config,
    read_lora_config,
    read_processor,
    read_tensors,
    resolve_local_backbones,
)
from .init_from import load_recorded_bridge
from .lora import ADAPTER, inject, unfuse_targeted_attention
from .save import adapter_tensors, name_in_file
from .trainable import parts_in_adapter, trainable_parameters


def load_adapter(
    folder: str | Path,
    *,
    start: str | Path | None = None,
    device: torch.device | str | None = None,
    quantized: bool | Quantization = True,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model in eval mode, all of it frozen, and its processor. Its ``generate`` answers greedily by itself.

    folder: or ``org/name[@revision]`` on the Hub, as everywhere that an adapter or a model is named.
    start: where the bridge that the adapter builds on lies now, if not where it lay in training. device: where the model
    goes, by default to the GPU where there is one. quantized: the base as in training (True), unquantized (False), or
    as given.

    Raises UserError when the folder is no adapter, the base is another than the one it was trained on, or its weights
    are missing, damaged or do not fit.
    """
    folder = fetch_model(folder)
    model, processor = (
        load_base(folder, start=start, device=device, quantized=quantized),
        read_processor(folder),
    )
    load_adapter_into(model, folder)
    use_greedy_decoding(model, processor)
    return model.eval().requires_grad_(False), processor


def load_trained(
    folder: str | Path, *, quantization: Quantization | Literal["none"] | None = None
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """An adapter's model, or a merged one, in eval mode on the GPU where there is one, and its processor.

    quantization: of the frozen weights; None: as in training, or as a merged model is stored.
    """
    folder = fetch_model(folder)
    if is_whole_model(folder):
        return load_whole_model(folder, quantization), read_processor(folder)
    quantized = {None: True, "none": False}.get(quantization, quantization)
    return load_adapter(folder, quantized=quantized)


def load_whole_model(
    folder: Path, quantization: Quantization | Literal["none"] | None = None
) -> FlamingoForConditionalGeneration:
    """A merged model, or any that was saved whole, in eval mode on the GPU where there is one.

    Raises UserError for a ``quantization`` of a model that is stored quantized.
    """
    stored = getattr(read_flamingo_config(folder), "quantization_config", None)
    if quantization is not None and stored:
        raise UserError(
            f"{folder}: the model is stored quantized, which cannot be changed as it is loaded; "
            "leave quantization out, or merge its adapter again with another --quantization"
        )
    options = (
        {"quantization_config": quantization.bnb_config()} if isinstance(quantization, Quantization) else {}
    )
    model = FlamingoForConditionalGeneration.from_pretrained(
        folder, device_map={"": default_device()}, **options
    )
    return model.eval().requires_grad_(False)


def load_base(
    folder: str | Path,
    *,
    start: str | Path | None = None,
    quantized: bool | Quantization = True,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: torch.device | str | None = None,
) -> FlamingoForConditionalGeneration:
    """What an adapter was trained on: its backbones and the bridge it builds on, a random one where it builds on none.

    quantized: as in training (True), unquantized (False), or as given. dtype: of the unquantized language model. Raises
    UserError as `load_adapter` does.
    """
    folder, start = fetch_model(folder), None if start is None else fetch_model(start)
    options = {"quantized": quantized, "dtype": dtype, "device": device}
    model = assemble_model(folder, read_config(folder), start, **options)
    if (lora := read_lora_config(folder)) is not None:
        unfuse_targeted_attention(model, lora)
    return model


def assemble_model(
    folder: Path,
    config: FlamingoConfig,
    start: str | Path | None,
    *,
    quantized: bool | Quantization = True,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: torch.device | str | None = None,
) -> FlamingoForConditionalGeneration:
    """The model of a configuration, read from ``folder``, out of its parts; otherwise as `load_base`."""
    device = default_device() if device is None else torch.device(device)
    model = assemble_backbones(folder, config, quantized, dtype, device)
    if config.bridge_init:
        load_recorded_bridge(model, folder, start)
    model.to(device)
    if quantized and config.bridge_quantization:
        quantize_frozen_bridge(model, Quantization.from_record(config.bridge_quantization))
    return model


def assemble_backbones(
    folder: Path,
    config: FlamingoConfig,
    quantized: bool | Quantization,
    dtype: torch.dtype | Literal["auto"] | None,
    device: torch.device,
) -> FlamingoForConditionalGeneration:
    """The backbones that a configuration names, which must be those it records, with a bridge of random weights.

    The model's own configuration has the places where local ones lie now.
    """
    config = resolve_local_backbones(folder, config)
    loaded = {
        part: _load(part, config.backbones[part], quantized, dtype, device) for part in ("vision", "language")
    }
    for part, backbone in loaded.items():
        check_backbone(folder, part, config.backbones[part], backbone.source)
    lm = loaded["language"].model
    grow_vocabulary(lm, config.text_config.vocab_size)
    return FlamingoForConditionalGeneration(config, loaded["vision"].visual, lm)


def load_adapter_into(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Put LoRA and bridge of an adapter into its base. Each tensor must be there and fit."""
    tensors, lora = read_tensors(folder), read_lora_config(folder)
    if lora is not None:
        inject(model, lora)
    check_tensors(folder, tensors, adapter_tensors(model))
    set_bridge_parameters(model, {name: tensor for name, tensor in tensors.items() if not is_lora(name)})
    model.adapter_base = read_base_name(folder)
    if lora is not None:
        load_lora_weights(model, {name: tensor for name, tensor in tensors.items() if is_lora(name)})


@torch.no_grad()
def set_bridge_parameters(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of the bridge, in the number formats that the tensors have."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data = tensor.to(parameters[name].device)


def load_lora_weights(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], adapter: str = ADAPTER
) -> None:
    """Fill the updates of an injected adapter, in the number formats that the tensors have."""
    for name, parameter in model.named_parameters():
        if is_lora(name) and (f".{adapter}." in name or name.endswith(f".{adapter}")):
            parameter.data = parameter.data.to(next(iter(tensors.values())).dtype)
    set_peft_model_state_dict(model, dict(tensors), adapter)


def quantize_frozen_bridge(model: FlamingoForConditionalGeneration, quantization: Quantization) -> None:
    """Keep the matrices of the bridge's parts that no adapter of this model holds in fewer bits."""
    trained = parts_in_adapter(model.config)
    for part in BRIDGE.values():
        if part.takes_lora and part.name not in trained:
            quantize_linears(model.get_submodule(part.module), quantization, model.device)
    mark_quantized(model)


def check_backbone(folder: Path, part: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a backbone that is not the one the adapter was trained on."""
    if found["sha256"] != wanted["sha256"]:
        raise UserError(
            f"{folder}: adapter of another base: {part} backbone {wanted['name']} had content {wanted['sha256'][:12]}, "
            f"found {found['sha256'][:12]}; restore the backbone that the adapter was trained on"
        )


def _load(
    part: str,
    source: Mapping[str, Any],
    quantized: bool | Quantization,
    dtype: torch.dtype | Literal["auto"] | None,
    device: torch.device,
):
    """A backbone as an adapter records it."""
    if isinstance(quantized, Quantization):
        quantization = quantized
    else:
        quantization = Quantization.from_record(source.get("quantization")) if quantized else None
    options = {
        "name": source["name"],
        "revision": source["revision"],
        "quantization": quantization,
        "device": device,
    }
    if part == "vision":
        return load_vision(pretrained=source["pretrained"], image_size=source.get("image_size"), **options)
    return load_language(dtype=dtype, **options)


def check_tensors(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if found.keys() != wanted.keys():
        lacking, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise UserError(
            f"{folder}: lacks {len(lacking)} of its weights and has {len(unknown)} unknown ones, "
            f"such as {(lacking or unknown)[0]}; the adapter is damaged"
        )
    for name, target in wanted.items():
        if found[name].shape != target.shape:
            shapes = tuple(found[name].shape), tuple(target.shape)
            raise UserError(
                f"{folder}: {name} has shape {shapes[0]}, wanted {shapes[1]}; the adapter is damaged"
            )


PLACES = (
    "name",
    "pretrained",
    "revision",
    "path",
)  # of a base: where it was, which may change; its content may not


@torch.no_grad()
def restore_trainable(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Copy an adapter that `save_adapter` wrote of this model into its trainable parameters, to the last bit.

    Raises UserError where the adapter lacks one of them, has it in another shape, or belongs to another base.
    """
    _check_base(model, folder)
    tensors = read_tensors(folder)
    let_go(model)
    for name, parameter in trainable_parameters(model).items():
        stored = tensors.get(name_in_file(name))
        if stored is None:
            raise UserError(
                f"{folder}: {name} trains, but is not in this adapter; resume with the recipe of its run"
            )
        # Updates that took their start out of the base are kept with that start behind them (`_with_start`).
        stored = stored[tuple(slice(size) for size in parameter.shape)]
        if stored.shape != parameter.shape:
            found = f"{name} has shape {tuple(stored.shape)}, wanted {tuple(parameter.shape)}"
            raise UserError(f"{folder}: {found}; resume with the recipe of its run")
        fill(parameter, stored)


def _check_base(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    stored, here = _base_of(read_config(folder)), _base_of(model.config)
    for part, record in stored.items():
        if _content(record) != _content(here[part]):
            raise UserError(
                f"{folder}: trained on {part} {record}, got {here[part]}; restore what it was trained on"
            )


def _base_of(config: FlamingoConfig) -> dict[str, Mapping[str, Any]]:
    """What an adapter's configuration records of each part of the model that it belongs to."""
    parts = {f"{part} backbone": source for part, source in (config.backbones or {}).items()}
    return {"bridge of": config.bridge_init or {}, "vision backbone": {}, "language backbone": {}, **parts}


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what copies of the same content differ in."""
    return {key: value for key, value in record.items() if key not in PLACES}
