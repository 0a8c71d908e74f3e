"""An adapter and its base -> one standalone model, every written tensor of it verified.

Merging starts from the base's unquantized weights (LoRA folded into 4-bit weights would be rounded again), or from
what the quantized ones stand for, which is what the adapter was trained on. What either choice costs on data is
measured in `evaluation.merging`, which calls this.
"""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from flamingo_ft.backbones.attention import close_attention
from flamingo_ft.backbones.identity import tensors_sha256
from flamingo_ft.backbones.quantization import Quantization, dequantize_linears
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, CONFIG_FILE, MODEL_SAFETENSORS
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor

from .answering import answer_greedily
from .card import write_card
from .files import read_config, read_flamingo_config, read_tensors
from .fold import cast, fold_lora
from .load import load_base, put_adapter
from .save import forget_place
from .verify import verify_merge

Base = Literal["bf16", "dequantized"]
LARGEST_SHARD = "2GB"


def write_merged(
    adapter: Path,
    folder: Path,
    processor: FlamingoProcessor,
    *,
    base: Base = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """Merge in host RAM, write the model to ``folder``, and verify what was written against a second copy of the base.

    base: the backbones' unquantized weights (bf16), or what the quantized ones stand for (dequantized). dtype: of the
    merged weights; gates stay in float32. start: where the bridge that the adapter builds on lies now, if not where
    it lay in training.

    Returns ``lora``, the parts that had LoRA, and ``verified``. Raises UserError where the base is not the one that
    the adapter was trained on or cannot be merged into, for values beyond the range of ``dtype``, and for a model
    that is not W + scale * B A.
    """
    parts = _write(adapter, folder, processor, base, dtype, start)
    gc.collect()  # hooks and what they hook onto refer to each other
    verified = verify_merge(folder, adapter, _load_base(adapter, base, dtype, start), dtype)
    gc.collect()
    return {"lora": parts, "verified": asdict(verified)}


def check_mergeable(adapter: Path, out: Path) -> None:
    """Raise UserError where ``out`` exists, and where ``adapter`` is no adapter."""
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is overwritten; choose another folder")
    config = adapter / CONFIG_FILE
    if (
        config.is_file()
        and not (adapter / ADAPTER_WEIGHTS).is_file()
        and read_flamingo_config(adapter).merged
    ):
        raise UserError(f"{adapter}: is a merged model already; give the adapter that it was merged from")
    read_config(adapter)


def trained_in(config: FlamingoConfig) -> list[str]:
    """Return the quantization formats of the base that an adapter was trained on."""
    kept = [config.bridge_quantization, *(source.get("quantization") for source in config.backbones.values())]
    return sorted({record["format"] for record in kept if record})


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
    """The base to merge into, in the dtype of its checkpoint: each sum is rounded once, when it is written."""
    # What was quantized in training is quantized from the same numbers again, whatever the merged weights will be
    # kept in.
    unquantized = {"quantized": False, "dtype": torch.float32 if dtype == torch.float32 else "auto"}
    options = {"quantized": True} if base == "dequantized" else unquantized
    return load_base(adapter, start=start, device="cpu", **options)


def _write(
    adapter: Path,
    folder: Path,
    processor: FlamingoProcessor,
    base: Base,
    dtype: torch.dtype,
    start: str | Path | None,
) -> list[str]:
    """Merge and write the model. Returns the parts that had LoRA."""
    _refuse_non_finite(adapter)
    model = _load_base(adapter, base, dtype, start)
    _refuse_other_quantization(adapter, model)
    put_adapter(model, adapter)
    parts = fold_lora(model, dtype)
    dequantize_linears(model, dtype)
    close_attention(model.vision_encoder)
    cast(model, dtype)
    answer_greedily(model, processor)
    digest = tensors_sha256(read_tensors(adapter))
    as_whole(model.config, dtype, {"adapter_sha256": digest, "base": base, "lora": parts})
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    processor.save_pretrained(folder)
    write_card(folder)
    return parts


def _refuse_non_finite(adapter: Path) -> None:
    """Refuse an adapter that holds NaN or infinity, which merging would spread over whole matrices."""
    for name, tensor in read_tensors(adapter).items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{adapter}: {name} has non-finite values (NaN or Inf); merge an earlier checkpoint"
            )


def _refuse_other_quantization(adapter: Path, model: FlamingoForConditionalGeneration) -> None:
    """Refuse a language model that came quantized in a way that cannot be undone here; bitsandbytes' can."""
    stored = dict(getattr(model.lang_encoder.config, "quantization_config", None) or {})
    method = stored.get("quant_method", "bitsandbytes")
    if "bitsandbytes" not in str(getattr(method, "value", method)):
        raise UserError(
            f"{adapter}: its language model is quantized with {method}, which LoRA cannot be folded into; "
            "train the adapter on the unquantized model, quantized as it is loaded"
        )


def as_whole(config: FlamingoConfig, dtype: torch.dtype, merged: dict[str, Any]) -> None:
    """The configuration of a model that builds on nothing else."""
    for source in config.backbones.values():
        source["quantization"] = None
    config.bridge_init = config.bridge_quantization = config.adapter_parts = None
    config.open_attention = False
    config.text_config.quantization_config = None
    forget_place(config)
    config.merged, config.dtype, config.text_config.dtype = merged, dtype, dtype
