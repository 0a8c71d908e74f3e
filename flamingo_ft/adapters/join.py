"""Join the adapters of runs of which each started from the one before it: one adapter with what all trained.

It needs none of them: its base is that of the first one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flamingo_ft.atomic import file_in_place
from flamingo_ft.backbones.quantization import cast_in_range
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from flamingo_ft.model import FlamingoConfig
from flamingo_ft.model.parts import BRIDGE, is_lora, parameter_dtype

from .card import write_card
from .files import PREFIX, parts_in_adapter, read_config, read_lora_config, read_processor, read_tensors
from .init_from import own_bridge_tensors
from .save import save_processor


def write_joined_adapter(adapters: Sequence[Path], folder: Path) -> dict[str, int]:
    """Write to ``folder`` what a chain of adapters trained; loaded, it equals the last one tensor by tensor.

    Each part of the bridge is taken from the last adapter that has it. adapters: in the order of training;
    the last one has all LoRA weights. Returns the number of values of each written tensor, by name.
    """
    last = adapters[-1]
    bridge: dict[str, Tensor] = {}
    for adapter in adapters:
        bridge |= own_bridge_tensors(adapter)
    lora = read_lora_config(last)
    dtype = _dtype_of_frozen(read_config(last))
    tensors = {_name_below_lora(name, lora): _cast(name, tensor, dtype) for name, tensor in bridge.items()}
    tensors |= {name: tensor for name, tensor in read_tensors(last).items() if is_lora(name)}
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    with file_in_place(folder / ADAPTER_WEIGHTS) as file:
        save_file(contiguous, file, metadata={"format": "pt"})
    shutil.copyfile(last / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    _joined_config(adapters).save_pretrained(folder)
    save_processor(read_processor(last), folder)
    write_card(folder)
    return {name: tensor.numel() for name, tensor in tensors.items()}


def _joined_config(adapters: Sequence[Path]) -> FlamingoConfig:
    """Return the last adapter's configuration, with the base of the first and the parts of all."""
    configs = [read_config(adapter) for adapter in adapters]
    config, base = configs[-1], configs[0].bridge_init
    if base is not None:
        base = {**base, "dtype": (config.bridge_init or base)["dtype"]}
    held = [part for one in configs for part in parts_in_adapter(one)]
    config.bridge_init, config.adapter_parts = base, [part for part in BRIDGE if part in held]
    return config


def _dtype_of_frozen(config: FlamingoConfig) -> torch.dtype | None:
    """Return the dtype in which an adapter's run had the frozen parts of its bridge; None without any."""
    record = config.bridge_init
    return None if record is None else getattr(torch, record["dtype"])


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else cast_in_range(name, tensor, parameter_dtype(name, dtype))


def _name_below_lora(name: str, lora: LoraConfig | None) -> str:
    """Return the name of a bridge tensor in a model with ``lora``, which wraps the layers that it targets."""
    module, _, leaf = name.rpartition(".")
    is_wrapped = lora is not None and re.fullmatch(str(lora.target_modules), module) is not None
    return f"{module}.base_layer.{leaf}" if is_wrapped else name
