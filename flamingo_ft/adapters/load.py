"""Load an adapter with its base, a merged model, or a checkpoint's trainable parameters.

The backbones are loaded by the names that the adapter records, quantized as it records, and must have the
content that it records; so must the bridge that it builds on, if any.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import set_peft_model_state_dict
from torch import Tensor

from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.quantization import Quantization, quantize_linears
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import TokenOptions
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import is_whole_model
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.added_tokens import grow_vocabulary
from flamingo_ft.model.parts import BRIDGE, cast_model, is_lora, trainable_parameters
from flamingo_ft.model.pretrained import mark_quantized
from flamingo_ft.model.sharding import copy_into, reshard
from flamingo_ft.processes import default_device

from .answering import use_greedy_decoding
from .files import (
    backbone_records,
    parts_in_adapter,
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

# Keys of a backbone's record that may differ between copies of the same content.
LOCATION_KEYS = ("name", "pretrained", "revision", "path")


def load_adapter(
    folder: str | Path,
    *,
    start: str | Path | None = None,
    device: torch.device | str | None = None,
    quantized: bool | Quantization = True,
    dtype: torch.dtype | None = None,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Load an adapter with its base; return the model and its processor.

    The model is in eval mode and frozen, and decodes greedily by default.

    Args:
        folder: a path, or ``org/name[@revision]`` on the Hub.
        start: where the bridge that the adapter builds on is now, if not at its recorded path.
        device: default: the GPU if there is one.
        quantized: the base as in training (True), unquantized (False), or with this quantization.
        dtype: of all weights but gates and quantized ones; None: the adapter's as saved, the tower's float32,
            the language model's its checkpoint's on a GPU and float32 on a CPU.

    Raises:
        UserError: the folder is not an adapter, the base is not the one that it was trained on, or weights
            are missing, damaged or do not fit.
    """
    folder = fetch_model(folder)
    model = load_base(folder, start=start, device=device, quantized=quantized, dtype=dtype)
    processor = read_processor(folder)
    load_adapter_into(model, folder)
    if dtype is not None:
        cast_model(model, dtype)
    use_greedy_decoding(model, processor)
    return model.eval().requires_grad_(False), processor


def load_trained(
    folder: str | Path,
    *,
    start: str | Path | None = None,
    quantization: Quantization | Literal["none"] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Load an adapter's model or a merged one, in eval mode, on the GPU if there is one, and its processor.

    Args:
        start: of an adapter, see `load_adapter`.
        quantization: of the frozen weights; None: as in training, or as a merged model is stored.
        dtype: of all weights but gates and quantized ones; None: see `load_adapter`, and as a merged model is
            stored.
    """
    folder = fetch_model(folder)
    if is_whole_model(folder):
        return load_whole_model(folder, quantization, dtype), read_processor(folder)
    if isinstance(quantization, Quantization):
        return load_adapter(folder, start=start, quantized=quantization, dtype=dtype)
    return load_adapter(folder, start=start, quantized=quantization is None, dtype=dtype)


def load_whole_model(
    folder: Path,
    quantization: Quantization | Literal["none"] | None = None,
    dtype: torch.dtype | None = None,
) -> FlamingoForConditionalGeneration:
    """Load a merged model, or any that was saved whole, in eval mode, on the GPU if there is one.

    dtype: of all weights but gates and quantized ones; None: as stored. Raises UserError for a
    ``quantization`` of a model that is stored quantized.
    """
    refuse_requantizing(folder, quantization)
    options = {}
    if isinstance(quantization, Quantization):
        quantization = quantization if dtype is None else quantization.computing_in(dtype)
        options = {"quantization_config": quantization.bnb_config()}
    model = FlamingoForConditionalGeneration.from_pretrained(
        folder, device_map={"": default_device()}, dtype=dtype or "auto", **options
    )
    if dtype is not None:
        cast_model(model, dtype)
    return model.eval().requires_grad_(False)


def refuse_requantizing(folder: Path, quantization: Quantization | str | None) -> None:
    """Raise UserError for a ``quantization`` of a model that is stored quantized, and for another model."""
    stored = getattr(read_flamingo_config(folder), "quantization_config", None)
    if quantization is not None and stored:
        raise UserError(
            f"{folder}: the model is stored quantized, which cannot be changed as it is loaded; "
            "leave quantization out, or merge its adapter again with another --quantization"
        )


def load_base(
    folder: str | Path,
    *,
    start: str | Path | None = None,
    quantized: bool | Quantization = True,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: torch.device | str | None = None,
) -> FlamingoForConditionalGeneration:
    """Load the base of an adapter: its backbones, and the bridge that it builds on or a random one.

    Args:
        dtype: of the unquantized language model.

    Other arguments are those of `load_adapter`. Raises UserError as it does.
    """
    folder = fetch_model(folder)
    start = None if start is None else fetch_model(start)
    config = read_config(folder)
    model = assemble_model(folder, config, start, quantized=quantized, dtype=dtype, device=device)
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
    """Assemble the model of a configuration that was read from ``folder``; see `load_base`."""
    device = default_device() if device is None else torch.device(device)
    model = assemble_backbones(folder, config, quantized, dtype, device)
    if config.bridge_init:
        load_recorded_bridge(model, folder, start)
    model.to(device)  # pyrefly: ignore[bad-argument-type]
    if quantized and (quantization := Quantization.from_record(config.bridge_quantization)):
        quantize_frozen_bridge(model, quantization)
    return model


def assemble_backbones(
    folder: Path,
    config: FlamingoConfig,
    quantized: bool | Quantization,
    dtype: torch.dtype | Literal["auto"] | None,
    device: torch.device,
) -> FlamingoForConditionalGeneration:
    """Load the backbones that a configuration names, check their content hashes, and add a random bridge.

    The model's own configuration has the current paths of local backbones.
    """
    config = resolve_local_backbones(folder, config)
    records = backbone_records(config)
    vision = _load_vision(records["vision"], quantized, dtype, device)
    language = _load_language(records["language"], quantized, dtype, device)
    check_backbone(folder, "vision", records["vision"], vision.source)
    check_backbone(folder, "language", records["language"], language.source)
    grow_vocabulary(language.model, config.get_text_config().vocab_size)
    return FlamingoForConditionalGeneration(config, vision.visual, language.model)


def load_adapter_into(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Load LoRA and bridge of an adapter into its base.

    Raises UserError if a tensor is missing or does not fit.
    """
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
    """Set parameters of the bridge, in the dtypes of ``tensors``."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].data = tensor.to(parameters[name].device)


def load_lora_weights(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], adapter: str = ADAPTER
) -> None:
    """Load the LoRA weights of an injected adapter, in the dtype of ``tensors``."""
    for name, parameter in model.named_parameters():
        if is_lora(name) and (f".{adapter}." in name or name.endswith(f".{adapter}")):
            parameter.data = parameter.data.to(next(iter(tensors.values())).dtype)
    set_peft_model_state_dict(model, dict(tensors), adapter)


def quantize_frozen_bridge(model: FlamingoForConditionalGeneration, quantization: Quantization) -> None:
    """Quantize the matrices of the bridge's parts that stay frozen, which no adapter of this model holds."""
    trained = parts_in_adapter(model.config)
    for part in BRIDGE.values():
        if part.takes_lora and part.name not in trained:
            quantize_linears(model.get_submodule(part.module), quantization, model.device)
    mark_quantized(model)


def check_backbone(folder: Path, part: str, recorded: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Raise UserError if a backbone is not the one that the adapter was trained on."""
    if loaded["sha256"] != recorded["sha256"]:
        raise UserError(
            f"{folder}: base mismatch: the adapter was trained on {part} backbone {recorded['name']} with "
            f"SHA-256 {recorded['sha256'][:12]}, got {loaded['sha256'][:12]}; restore that backbone"
        )


def _load_vision(
    record: Mapping[str, Any],
    quantized: bool | Quantization,
    dtype: torch.dtype | Literal["auto"] | None,
    device: torch.device,
):
    return load_vision(
        name=record["name"],
        pretrained=record["pretrained"],
        revision=record["revision"],
        image_size=record.get("image_size"),
        tokens=TokenOptions.of(record),
        quantization=_quantization(record, quantized, dtype),
        device=device,
    )


def _load_language(
    record: Mapping[str, Any],
    quantized: bool | Quantization,
    dtype: torch.dtype | Literal["auto"] | None,
    device: torch.device,
):
    return load_language(
        name=record["name"],
        revision=record["revision"],
        quantization=_quantization(record, quantized, dtype),
        dtype=dtype,
        device=device,
    )


def _quantization(
    record: Mapping[str, Any],
    quantized: bool | Quantization,
    dtype: torch.dtype | Literal["auto"] | None,
) -> Quantization | None:
    """Return the quantization to load with; an automatic compute dtype follows ``dtype``."""
    quantization = quantized
    if not isinstance(quantization, Quantization):
        recorded = Quantization.from_record(record.get("quantization")) if quantized else None
        if recorded is None:
            return None
        quantization = recorded
    return quantization.computing_in(dtype) if isinstance(dtype, torch.dtype) else quantization


def check_tensors(folder: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError unless an adapter's tensors have the names and shapes of ``expected``."""
    if stored.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        raise UserError(
            f"{folder}: lacks {len(missing)} of its weights and has {len(unknown)} unknown ones, "
            f"such as {(missing or unknown)[0]}; the adapter is damaged"
        )
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"{folder}: {name} must have shape {tuple(tensor.shape)}, got {tuple(stored[name].shape)}; "
                "the adapter is damaged"
            )


@torch.no_grad()
def restore_trainable(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Load an adapter that `save_adapter` wrote of this model into its trainable parameters, bit for bit.

    Raises UserError if the adapter lacks one of them, has it in another shape, or belongs to another base.
    """
    _check_base(model, folder)
    tensors = read_tensors(folder)
    reshard(model)
    for name, parameter in trainable_parameters(model).items():
        stored = tensors.get(name_in_file(name))
        if stored is None:
            raise UserError(
                f"{folder}: {name} is trainable, but not in this adapter; resume with the recipe of its run"
            )
        # PiSSA's weights are saved with their initial values appended (`save._minus_initial`).
        stored = stored[tuple(slice(size) for size in parameter.shape)]
        if stored.shape != parameter.shape:
            raise UserError(
                f"{folder}: {name} must have shape {tuple(parameter.shape)}, got {tuple(stored.shape)}; "
                "resume with the recipe of its run"
            )
        copy_into(parameter, stored)


def _check_base(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    stored, current = _base_records(read_config(folder)), _base_records(model.config)
    for part, record in stored.items():
        for key in sorted({*record, *current[part]} - set(LOCATION_KEYS)):
            recorded, loaded = record.get(key), current[part].get(key)
            if recorded != loaded:
                raise UserError(
                    f"{folder}: the adapter was trained with another {part}: {key} {recorded}, got {loaded}; "
                    "restore the one that it was trained with"
                )


def _base_records(config: FlamingoConfig) -> dict[str, Mapping[str, Any]]:
    """Return what a configuration records of each part of an adapter's base."""
    parts = {f"{part} backbone": source for part, source in backbone_records(config).items()}
    return {"start bridge": config.bridge_init or {}, "vision backbone": {}, "language backbone": {}, **parts}
