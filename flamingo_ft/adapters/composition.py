"""Write compositions, and load them or adapters of them with ``from_pretrained``.

A composition is the base of adapters as a folder without the weights of its backbones. It holds the
Flamingo's configuration, which names both backbones with their revisions and content hashes, the processor's
files, a card, and ``bridge.safetensors`` if adapters build on a bridge. An adapter names it as its base, so
that transformers and PEFT find everything that the adapter needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flamingo_ft.atomic import file_in_place
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.errors import UserError
from flamingo_ft.hub import existing_path, fetch_model
from flamingo_ft.hub.names import BACKBONE_KEYS, strip_local_paths
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.model.parts import cast_model, in_bridge
from flamingo_ft.model.pretrained import AdapterFolders
from flamingo_ft.processes import default_device
from flamingo_ft.templates import load_template
from flamingo_ft.version import __version__

from .answering import use_greedy_decoding
from .card import CARD
from .compat import mark_peft_loaded, requested_attention
from .files import (
    BRIDGE_FILE,
    backbone_records,
    read_config,
    read_flamingo_config,
    read_lora_config,
    read_processor,
)
from .init_from import bridge_tensors, load_bridge_as_stored
from .load import assemble_backbones, assemble_model, load_adapter
from .lora import targets_vision
from .save import reset_name_or_path, save_processor

# Options that do not change what is loaded: from transformers' own callers, or about where files are.
IGNORED_OPTIONS = {
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
# Configuration keys that may differ: dtypes, which are options, and keys that differ in adapter and base.
MAY_DIFFER = {
    "_name_or_path",
    "adapter_parts",
    "architectures",
    "bridge_init",
    "dtype",
    "open_attention",
    "text_config",
    "trained_on",
    "transformers_version",
    "auto_map",
}
SUPPORTED_OPTIONS = {"attn_implementation", "device_map", "dtype", "output_loading_info", "torch_dtype"}


def write_composition(adapter: str | Path, out: str | Path, *, start: str | Path | None = None) -> None:
    """Write the base of ``adapter`` to ``out``. The same base gives the same bytes.

    Args:
        start: where the bridge that the adapter builds on is now, if not at its recorded path.

    Raises:
        UserError: ``out`` exists, ``adapter`` is not an adapter, or the bridge that it builds on is gone or
            another one.
    """
    adapter, start, out = fetch_model(adapter), None if start is None else fetch_model(start), Path(out)
    if out.exists():
        raise UserError(f"{out}: exists, and nothing is overwritten; choose another folder")
    config, processor = read_config(adapter), read_processor(adapter)
    record = config.bridge_init
    bridge = _bridge_below(adapter, config, record, start) if record else None
    lora = read_lora_config(adapter)
    config.open_attention = config.open_attention or (lora is not None and targets_vision(lora))
    reset_name_or_path(config)
    config.trained_on = None
    out.mkdir(parents=True)
    if record and bridge is not None:
        record["path"] = BRIDGE_FILE
        with file_in_place(out / BRIDGE_FILE) as file:
            save_file(bridge, file, metadata={"format": "pt"})
    config.save_pretrained(out)
    save_processor(processor, out)
    _write_card(config, out)


def load_composition(folder: str | Path, **options: Any) -> FlamingoForConditionalGeneration:
    """Load the model of a composition, the base of its adapters, with the options of `load_base`.

    Raises UserError if a backbone or the bridge is not the recorded one.
    """
    folder = existing_path(folder)
    config = read_flamingo_config(folder)
    _check_named(folder, config)
    bridge = folder / BRIDGE_FILE
    if config.bridge_init:
        config.bridge_init["path"] = str(bridge.resolve())
    model = assemble_model(folder, config, bridge, **options)
    use_greedy_decoding(model, read_processor(folder))
    return model.eval().requires_grad_(False)


def name_base(adapter: str | Path, base: str) -> None:
    """Record in an adapter's folder which composition is its base: a folder, or ``org/name`` on the Hub.

    Raises UserError if ``adapter`` is not an adapter's folder.
    """
    path = Path(adapter) / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{adapter}: not an adapter, {path.name} not found; give the folder that a run wrote")
    values = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _bridge_below(
    adapter: Path, config: FlamingoConfig, record: Mapping[str, str], start: str | Path | None
) -> dict[str, torch.Tensor]:
    """Return the bridge that an adapter builds on, in the dtypes over which its hash was computed.

    The backbones are loaded too: a checkpoint's rows for new tokens are read through the language model.
    """
    model = assemble_backbones(adapter, config, quantized=False, dtype=None, device=torch.device("cpu"))
    before = _backbones_sha256(model)
    load_bridge_as_stored(model, adapter, record, start)
    if _backbones_sha256(model) != before:
        raise UserError(
            f"{adapter}: builds on a checkpoint with backbones of its own, which a composition cannot name; "
            "merge the adapter, and give the merged model"
        )
    return {name: tensor.contiguous() for name, tensor in sorted(bridge_tensors(model).items())}


def _backbones_sha256(model: FlamingoForConditionalGeneration) -> str:
    """Return a digest of both backbones without the rows of new tokens, which the token rows replace."""
    lm, ids = model.lang_encoder, torch.tensor(model.config.new_token_ids or [], dtype=torch.long)
    vocabulary = [
        id(module.weight) for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module
    ]
    named = ((name, p) for name, p in model.named_parameters() if not in_bridge(name))
    return tensors_sha256(
        {name: p.detach().index_fill(0, ids, 0) if id(p) in vocabulary else p for name, p in named}
    )


def _check_named(folder: Path, config: FlamingoConfig) -> None:
    if not all(backbone_records(config).get(part) for part in ("vision", "language")):
        raise UserError(
            f"{folder}: has neither weights nor the names of its backbones, so there is nothing to load; "
            "copy it again"
        )


def _write_card(config: FlamingoConfig, folder: Path) -> None:
    text = load_template("adapters/composition.md.jinja").render(
        version=__version__,
        vision=strip_local_paths(backbone_records(config)["vision"], BACKBONE_KEYS),
        language=strip_local_paths(backbone_records(config)["language"], BACKBONE_KEYS),
        bridge_init=config.bridge_init,
        precision=lambda source: (source.get("quantization") or {}).get("format", "full"),
    )
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def load_from_folders(folders: AdapterFolders, options: Mapping[str, Any]) -> Any:
    """Load an adapter with `load_adapter`, or a composition with `load_composition`, for ``from_pretrained``.

    Args:
        options: those of ``from_pretrained``. ``dtype`` applies to all weights but gates and quantized ones;
            by default each part keeps the dtype it was saved in. ``device_map`` is one device, or "auto" for
            the GPU if there is one; by default the CPU, for quantized backbones as "auto".

    Raises:
        UserError: an option is not supported.
    """
    folder = folders.adapter or folders.base
    assert folder is not None  # one of the two is always there
    _refuse(folder, options)
    device = _device(folder, options.get("device_map"))
    if folders.adapter is None:
        model = load_composition(folder, device=device)
    else:
        model, _ = load_adapter(folders.adapter, start=_bridge_in(folders.base), device=device)
        mark_peft_loaded(model, has_lora=bool(getattr(model, "peft_config", None)))
    dtype = _dtype(options)
    if dtype is not None:
        cast_model(model, dtype)
    attention = options.get("attn_implementation") or _requested_attention(options.get("config"))
    if attention is not None:
        model.set_attn_implementation(attention)
    return (model, _empty_report()) if options.get("output_loading_info") else model


def _refuse(folder: Path, options: Mapping[str, Any]) -> None:
    known = IGNORED_OPTIONS | SUPPORTED_OPTIONS
    unknown = sorted(key for key, value in options.items() if key not in known and value is not None)
    unknown += _changed(options.get("config"), read_flamingo_config(folder))
    if "quantization_config" in unknown:
        raise UserError(
            f"{folder}: the adapter's configuration fixes the quantization; merge the adapter, then load the "
            "merged model with a quantization_config"
        )
    if unknown:
        raise UserError(
            f"{folder}: from_pretrained does not support {', '.join(unknown)} for an adapter; omit it, or "
            "merge the adapter and load the merged model"
        )


def _changed(config: Any, stored: FlamingoConfig) -> list[str]:
    """Return the keys that a caller changed in a configuration; Auto classes pass on what they read."""
    if not isinstance(config, FlamingoConfig):
        return []
    original, current = stored.to_dict(), config.to_dict()
    return [key for key in sorted(current) if key not in MAY_DIFFER and current[key] != original.get(key)]


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
            f"{folder}: device_map {device_map} is not a single device; use one (cuda:0, cpu), or merge the "
            "adapter to load it across several"
        ) from None


def _is_quantized(config: FlamingoConfig) -> bool:
    return any((source or {}).get("quantization") for source in backbone_records(config).values())


def _dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """Return the requested dtype; None keeps each part's own."""
    dtype = options.get("dtype") or options.get("torch_dtype")
    if dtype in (None, "auto"):
        return None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype {dtype!r} is not a torch dtype; give one such as bfloat16, or auto")
    return dtype


def _requested_attention(config: Any) -> str | None:
    return requested_attention(config) if isinstance(config, FlamingoConfig) else None


def _bridge_in(base: Path | None) -> Path | None:
    if base is None or not (base / BRIDGE_FILE).is_file():
        return None
    return base / BRIDGE_FILE


def _empty_report() -> dict[str, Any]:
    """Return transformers' loading report without problems: loading raises for each."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
