"""What ``from_pretrained`` gives for an adapter's folder and for a composition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flamingo_ft.backbones.device_and_dtype import default_device
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoConfig
from flamingo_ft.model.parts import Parts

from .composition import load_composition
from .files import BRIDGE_FILE, read_flamingo_config
from .fold import cast
from .load import load_adapter

# What transformers' own callers pass along, and what says where files lie: nothing of it changes what is loaded here.
OF_NO_MATTER = {
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "config",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "tqdm_class",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
}
# Of a configuration: formats, which are options of their own, and in what an adapter's and its base's may differ.
MAY_DIFFER = {
    "_name_or_path",
    "adapter_parts",
    "architectures",
    "bridge_init",
    "dtype",
    "open_attention",
    "text_config",
    "transformers_version",
    "auto_map",
}
UNDERSTOOD = {"attn_implementation", "device_map", "dtype", "output_loading_info", "torch_dtype"}


def load_parts(parts: Parts, options: Mapping[str, Any]) -> Any:
    """The model in ``parts``, frozen and in eval mode: an adapter's as `load_adapter` gives it, a composition's as
    `load_composition`.

    options: transformers'. ``dtype``: of all weights that are not quantized, but the gates; without one each part
    keeps the format it was saved in. ``device_map``: one device, or "auto" for the GPU where there is one; without one the
    CPU, or for quantized parts as with "auto". Raises UserError for options that say more than can be done.
    """
    folder = parts.adapter or parts.base
    _refuse(folder, options)
    device = _device(folder, options.get("device_map"))
    if parts.adapter is None:
        model = load_composition(folder, device=device)
    else:
        model, _ = load_adapter(folder, start=_bridge_in(parts.base), device=device)
        model._hf_peft_config_loaded = bool(getattr(model, "peft_config", None))
    dtype = _dtype(options)
    if dtype is not None:
        cast(model, dtype)
    attention = options.get("attn_implementation") or _asked_attention(options.get("config"))
    if attention is not None:
        model.set_attn_implementation(attention)
    return (model, _nothing_missing()) if options.get("output_loading_info") else model


def _refuse(folder: Path, options: Mapping[str, Any]) -> None:
    known = OF_NO_MATTER | UNDERSTOOD
    unknown = sorted(key for key, value in options.items() if key not in known and value is not None)
    unknown += _changed(options.get("config"), read_flamingo_config(folder))
    if "quantization_config" in unknown:
        remedy = "merge it and load that with a quantization_config"
        raise UserError(f"{folder}: its backbones are kept as it records, in no other quantization; {remedy}")
    if unknown:
        raise UserError(
            f"{folder}: from_pretrained cannot take {', '.join(unknown)} where a model is put together from its "
            "backbones; leave it out, or merge the adapter and load that"
        )


def _changed(given: Any, stored: FlamingoConfig) -> list[str]:
    """What a configuration that was passed says otherwise than the stored one: what a caller changed, since Auto
    classes pass on what they read."""
    if not isinstance(given, FlamingoConfig):
        return []
    ours, theirs = stored.to_dict(), given.to_dict()
    return [key for key in sorted(theirs) if key not in MAY_DIFFER and theirs[key] != ours.get(key)]


def _device(folder: Path, device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None:
        return default_device() if _is_quantized(read_flamingo_config(folder)) else torch.device("cpu")
    if device_map == "auto":
        return default_device()
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise UserError(
            f"{folder}: device_map {device_map} is not one device; give one (cuda:0, cpu), or merge it to spread it"
        ) from None


def _is_quantized(config: FlamingoConfig) -> bool:
    return any((source or {}).get("quantization") for source in (config.backbones or {}).values())


def _dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """The number format that was asked for; None for each part's own."""
    asked = options.get("dtype") or options.get("torch_dtype")
    asked = getattr(torch, asked, asked) if isinstance(asked, str) else asked
    if asked in (None, "auto"):
        return None
    if not isinstance(asked, torch.dtype):
        raise UserError(f"dtype {asked!r} is no number format; give one such as bfloat16, or auto")
    return asked


def _asked_attention(config: Any) -> str | None:
    """What an Auto class was asked for, which passes it on inside the configuration."""
    return (
        getattr(config, "_attn_implementation_internal", None) if isinstance(config, FlamingoConfig) else None
    )


def _bridge_in(base: Path | None) -> Path | None:
    bridge = None if base is None else base / BRIDGE_FILE
    return bridge if bridge is not None and bridge.is_file() else None


def _nothing_missing() -> dict[str, Any]:
    """transformers' loading report of a model in which everything found its place, as is checked while loading."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
