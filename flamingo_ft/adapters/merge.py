"""Merge an adapter and its base into one standalone, verified model: W' = W + scale * B A.

Merging starts from the base's unquantized weights (LoRA folded into 4-bit weights would be quantized again),
or from the dequantized ones, which the adapter was trained on. What either choice costs on data is measured
by `evaluation.merging`, which calls this.
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from flamingo_ft.backbones.attention import restore_fused_attention
from flamingo_ft.backbones.freed_memory import freed_memory_returned
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.quantization import (
    Quantization,
    cast_in_range,
    dequantize_linears,
    dequantized_linear,
    is_quantized,
)
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, CONFIG_FILE, MODEL_SAFETENSORS
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.parts import PARTS, cast_parameters, is_lora

from .answering import use_greedy_decoding
from .card import write_card
from .files import backbone_records, read_config, read_flamingo_config, read_tensors
from .load import load_adapter_into, load_base
from .save import reset_name_or_path
from .verify import verify_merge

Base = Literal["bf16", "dequantized"]
LARGEST_SHARD = "2GB"


@freed_memory_returned()
def write_merged(
    adapter: Path,
    folder: Path,
    processor: FlamingoProcessor,
    *,
    base: Base = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """Merge in host RAM, write the model to ``folder``, and verify it against a second copy of the base.

    Args:
        base: start from the backbones' unquantized weights (bf16) or from the dequantized ones (dequantized).
        dtype: of the merged weights; gates stay in float32.
        start: where the bridge that the adapter builds on is now, if not at its recorded path.

    Returns:
        ``lora``, the parts that had LoRA, and ``verified``, a `VerificationResult` as a dict.

    Raises:
        UserError: the base is not the one that the adapter was trained on or cannot be merged into, a value
            is beyond the range of ``dtype``, or the written model is not W + scale * B A.
    """
    parts = _write(adapter, folder, processor, base, dtype, start)
    gc.collect()  # hooks and their modules are reference cycles
    verified = verify_merge(folder, adapter, _load_base(adapter, base, dtype, start), dtype)
    gc.collect()
    return {"lora": parts, "verified": asdict(verified)}


def check_mergeable(adapter: Path, out: Path) -> None:
    """Raise UserError if ``out`` exists or ``adapter`` is not an adapter."""
    if out.exists():
        raise UserError(f"{out}: exists, and nothing is overwritten; choose another folder")
    config = adapter / CONFIG_FILE
    if (
        config.is_file()
        and not (adapter / ADAPTER_WEIGHTS).is_file()
        and read_flamingo_config(adapter).merged
    ):
        raise UserError(f"{adapter}: is a merged model already; give the adapter that it was merged from")
    read_config(adapter)


def base_quantizations(config: FlamingoConfig) -> list[str]:
    """Return the quantization formats of the base that an adapter was trained on."""
    records = [source.get("quantization") for source in backbone_records(config).values()]
    return sorted({record["format"] for record in (config.bridge_quantization, *records) if record})


def quantize_merged(folder: Path, quantization: Quantization) -> None:
    """Write the merged model in ``folder`` again, quantized."""
    model = FlamingoForConditionalGeneration.from_pretrained(
        folder, quantization_config=quantization.bnb_config()
    )
    for file in folder.glob(f"{MODEL_SAFETENSORS}*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)


def _load_base(
    adapter: Path, base: Base, dtype: torch.dtype, start: str | Path | None
) -> FlamingoForConditionalGeneration:
    """Load the base to merge into, in the dtype of its checkpoint: each sum is rounded once, when written."""
    if base == "dequantized":  # quantized from the same values as in training, whatever the merged dtype
        return load_base(adapter, start=start, device="cpu", quantized=True)
    lm_dtype: torch.dtype | Literal["auto"] = torch.float32 if dtype == torch.float32 else "auto"
    return load_base(adapter, start=start, device="cpu", quantized=False, dtype=lm_dtype)


def _write(
    adapter: Path,
    folder: Path,
    processor: FlamingoProcessor,
    base: Base,
    dtype: torch.dtype,
    start: str | Path | None,
) -> list[str]:
    """Merge and write the model; return the parts that had LoRA."""
    _refuse_non_finite(adapter)
    model = _load_base(adapter, base, dtype, start)
    _refuse_other_quantization(adapter, model)
    load_adapter_into(model, adapter)
    parts = fold_lora(model, dtype)
    dequantize_linears(model, dtype)
    restore_fused_attention(model.vision_encoder)
    cast_parameters(model, dtype)
    use_greedy_decoding(model, processor)
    digest = tensors_sha256(read_tensors(adapter))
    make_standalone(model.config, dtype, {"adapter_sha256": digest, "base": base, "lora": parts})
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    processor.save_pretrained(folder)
    write_card(folder)
    return parts


def _refuse_non_finite(adapter: Path) -> None:
    """Raise UserError for an adapter with NaN or Inf, which merging would spread over whole matrices."""
    for name, tensor in read_tensors(adapter).items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{adapter}: {name} has non-finite values (NaN or Inf); merge an earlier checkpoint"
            )


def _refuse_other_quantization(adapter: Path, model: FlamingoForConditionalGeneration) -> None:
    """Raise UserError if the language model is quantized by another library than bitsandbytes."""
    stored = dict(getattr(model.lang_encoder.config, "quantization_config", None) or {})
    method = stored.get("quant_method", "bitsandbytes")
    if "bitsandbytes" not in str(getattr(method, "value", method)):
        raise UserError(
            f"{adapter}: its language model is quantized with {method}, which LoRA cannot be folded into; "
            "train the adapter on the unquantized model, quantized as it is loaded"
        )


def make_standalone(config: FlamingoConfig, dtype: torch.dtype, merged: dict[str, Any]) -> None:
    """Turn the configuration of an adapter's model into that of a standalone model, in place."""
    for source in backbone_records(config).values():
        source["quantization"] = None
    config.bridge_init = config.bridge_quantization = config.adapter_parts = None
    config.open_attention = False
    text_config = config.get_text_config()
    text_config.quantization_config = None  # pyrefly: ignore[missing-attribute]
    reset_name_or_path(config)
    config.merged, config.dtype, text_config.dtype = merged, dtype, dtype


def fold_lora(model: FlamingoForConditionalGeneration, dtype: torch.dtype | None = None) -> list[str]:
    """Fold LoRA into its matrices, in place and one at a time; return the parts that had any.

    Each sum is computed in float32, from the matrix as loaded, dequantized if necessary, and rounded once.

    Args:
        dtype: of the result; None keeps a matrix's own, float32 for a quantized one.

    Raises:
        UserError: a sum is beyond the range of the dtype.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        plain = _in_float32(name, layer, model)
        original = layer.get_base_layer().weight.dtype
        plain.merge(safe_merge=True)
        folded = plain.get_base_layer()
        final = dtype or (original if original.is_floating_point else torch.float32)
        for leaf, parameter in folded.named_parameters():
            parameter.data = cast_in_range(f"{name}.{leaf}", parameter.data, final)
        model.set_submodule(name, folded)
    if layers:
        del model.peft_config
    return [part.name for part in PARTS.values() if any(name.startswith(part.prefix) for name in layers)]


def _in_float32(name: str, layer: Any, model: FlamingoForConditionalGeneration) -> Any:
    """Return a `LoraLayer` in float32, around a dequantized matrix if it is quantized."""
    if not is_quantized(layer.get_base_layer()):
        return layer.float()
    alone = nn.ModuleDict({"layer": dequantized_linear(layer.get_base_layer(), torch.float32, name)})
    for adapter, config in model.peft_config.items():
        own = dataclasses.replace(
            cast(LoraConfig, config),
            r=layer.r[adapter],
            lora_alpha=layer.lora_alpha[adapter],
            rank_pattern={},
            alpha_pattern={},
            target_modules=["layer"],
        )
        inject_adapter_in_model(own, alone, adapter)
    lora = {key: tensor for key, tensor in layer.state_dict().items() if is_lora(f".{key}")}
    alone["layer"].load_state_dict(lora, strict=False)
    return alone["layer"].float()
