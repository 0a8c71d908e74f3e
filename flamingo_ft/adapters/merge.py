"""An adapter and its base -> one standalone model, checked against the adapter before it is called done.

Merging starts from the base's unquantized weights (LoRA folded into 4-bit weights would be rounded again), or from what the
quantized ones stand for, which is what the adapter was trained on.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flamingo_ft.atomic import folder_in_place
from flamingo_ft.backbones.attention import close_attention
from flamingo_ft.backbones.identity import tensors_sha256
from flamingo_ft.backbones.quantization import Quantization, dequantize_linears
from flamingo_ft.config import RECIPE_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor

from .answering import answer_greedily
from .card import write_card
from .code import write_code
from .compare import difference, logits_on, sample_prompts
from .files import WEIGHTS, read_config, read_flamingo_config, read_processor, read_tensors
from .fold import cast, fold_lora
from .load import load_adapter, load_base, load_whole, put_adapter
from .save import forget_place

Base = Literal["bf16", "dequantized"]
MERGE_FILE = "merge.json"
LARGEST_SHARD = "2GB"

# Largest relative logit difference from the adapter that is accepted. Seen: 4e-6 where only float32 rounds, 0.02 where
# weights are kept in 16 bits, 0.05 to 0.11 where the adapter saw rounded weights or activations and the merged model does not.
EXACT, ROUNDED, OTHER_BASE = 1e-4, 0.05, 0.25


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base: Base = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization | None = None,
    tolerance: float | None = None,
    start: str | Path | None = None,
    with_code: bool = False,
) -> dict[str, Any]:
    """Write the merged model to ``out``: safetensors shards, configuration, processor, and what the check found.

    base: the backbones' unquantized weights (bf16), or what the quantized ones stand for (dequantized).
    dtype: of the merged weights; gates stay in float32. quantization: how the written model is kept.
    tolerance: the largest relative difference of its logits from the adapter's.
    start: where the bridge that the adapter builds on lies now, if not where it lay in training.
    with_code: put the package's code beside the model, for transformers where the package is not.

    Returns what is written to ``merge.json``. Raises UserError when ``out`` exists, ``adapter`` is a merged model
    already, its base is another than it was trained on, and when the merged model differs from it beyond ``tolerance``:
    then nothing is left at ``out``.
    """
    named, adapter, out = str(adapter), fetch_model(adapter), Path(out)
    _check_places(adapter, out)
    processor = read_processor(adapter)
    prompts, where_from = sample_prompts(processor, adapter)
    expected, computed_in = _logits(lambda: load_adapter(adapter, start=start)[0], prompts)
    rounded = quantization is not None or {dtype, *computed_in} != {torch.float32}
    formats = _formats(read_config(adapter))
    limit = _tolerance(formats, base, rounded, quantization is not None) if tolerance is None else tolerance
    with folder_in_place(out) as folder:
        parts = _write(adapter, folder, processor, base, dtype, start)
        if quantization is not None:
            _quantize(folder, quantization)
        found = difference(_logits(lambda: load_whole(folder), prompts)[0], expected)
        kept = {"base": base, "dtype": str(dtype).removeprefix("torch."), "lora": parts}
        kept["quantization"] = None if quantization is None else quantization.record()
        report = {"adapter": named, "trained_in": sorted(formats), **kept, **asdict(found)}
        report |= {"prompts_from": where_from, "tolerance": limit}
        _check_close(report)
        if with_code:
            write_code(folder)
        (folder / MERGE_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if (adapter / RECIPE_FILE).is_file():
            shutil.copyfile(adapter / RECIPE_FILE, folder / RECIPE_FILE)
    return report


def _check_places(adapter: Path, out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is overwritten; choose another folder")
    config = adapter / "config.json"
    if config.is_file() and not (adapter / WEIGHTS).is_file() and read_flamingo_config(adapter).merged:
        raise UserError(f"{adapter}: is a merged model already; give the adapter that it was merged from")
    read_config(adapter)


def _logits(
    load: Callable[[], FlamingoForConditionalGeneration], prompts: Sequence[dict[str, Tensor]]
) -> tuple[list[Tensor], set[torch.dtype]]:
    """Logits on the prompts, and the number formats, of a model that is held no longer than that: two may be too many."""
    model = load()
    found = logits_on(model, prompts), {p.dtype for p in model.parameters() if p.is_floating_point()}
    del model
    gc.collect()  # hooks and what they hook onto refer to each other
    return found


def _write(
    adapter: Path, folder: Path, processor: FlamingoProcessor, base: Base, dtype: torch.dtype, start: str | Path | None
) -> list[str]:
    """Merge in the computer's memory and write the model. Returns the parts that had LoRA."""
    # What was quantized in training is quantized from the same numbers again, whatever the merged weights will be kept in.
    options = {"quantized": True} if base == "dequantized" else {"quantized": False, "dtype": dtype}
    model = load_base(adapter, start=start, device="cpu", **options)
    _check_mergeable(adapter, model)
    dequantize_linears(model, dtype)
    put_adapter(model, adapter)
    parts = fold_lora(model)
    close_attention(model.vision_encoder)
    cast(model, dtype)
    answer_greedily(model, processor)
    as_whole(model.config, dtype, {"adapter_sha256": tensors_sha256(read_tensors(adapter)), "base": base, "lora": parts})
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    processor.save_pretrained(folder)
    write_card(folder)
    return parts


def _check_mergeable(adapter: Path, model: FlamingoForConditionalGeneration) -> None:
    """Refuse a language model that came quantized in a way that cannot be undone here; bitsandbytes' can."""
    stored = dict(getattr(model.lang_encoder.config, "quantization_config", None) or {})
    method = stored.get("quant_method", "bitsandbytes")
    if "bitsandbytes" not in str(getattr(method, "value", method)):
        raise UserError(
            f"{adapter}: its language model is kept in {method}, which cannot take an update in; "
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


def _quantize(folder: Path, quantization: Quantization) -> None:
    """Write the model in ``folder`` again, quantized."""
    model = FlamingoForConditionalGeneration.from_pretrained(folder, quantization_config=quantization.bnb_config())
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)


def _formats(config: FlamingoConfig) -> set[str]:
    """The formats that the adapter's base was kept in when it was trained."""
    kept = [config.bridge_quantization, *(source.get("quantization") for source in config.backbones.values())]
    return {record["format"] for record in kept if record}


def _tolerance(formats: set[str], base: Base, rounded: bool, quantized_again: bool) -> float:
    # int8 rounds what goes into a matrix too, so the matrix that it stands for computes something else.
    differs = "int8" in formats or (formats and base == "bf16") or quantized_again
    return OTHER_BASE if differs else ROUNDED if rounded else EXACT


def _closer(report: dict[str, Any]) -> str:
    """What could bring the merged model closer to the adapter."""
    choices = {
        "--base dequantized": report["trained_in"] and report["base"] == "bf16",
        "--dtype fp32": report["dtype"] != "float32",
    }
    possible = " and ".join(choice for choice, is_left in choices.items() if is_left)
    return f"merge with {possible}, or " if possible else ""


def _check_close(report: dict[str, Any]) -> None:
    if not report["relative"] <= report["tolerance"]:
        raise UserError(
            f"{report['adapter']}: the merged model's logits are {report['relative']:.2g} of the largest away from the "
            f"adapter's (token agreement {report['token_agreement']:.1%}), beyond the tolerance of {report['tolerance']:.2g}; "
            f"{_closer(report)}accept more with --tolerance"
        )
