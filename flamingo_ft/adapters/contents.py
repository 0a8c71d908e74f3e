"""What is in an adapter."""

from __future__ import annotations

from peft import get_peft_model_state_dict
from torch import Tensor

from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration

from .lora import ADAPTER, has_lora
from .trainable import BRIDGE, is_lora


def adapter_tensors(model: FlamingoForConditionalGeneration, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """What an adapter holds, by name: LoRA, and the parts of the bridge that its base does not have."""
    kept = tuple(BRIDGE[part] for part in kept_parts(model.config))
    state = model.state_dict()
    bridge = {
        _own_name(model, name, adapter): tensor
        for name, tensor in state.items()
        if name.startswith(kept) and not is_lora(name)
    }
    # PEFT would look for the vocabulary's original size on the Hub; the token rows have what was added to it.
    has_any = has_lora(model, adapter)
    lora = get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False) if has_any else {}
    return bridge | lora


def _own_name(model: FlamingoForConditionalGeneration, name: str, adapter: str) -> str:
    """A tensor's name where ``adapter`` is the only one: a layer that only others update is plain then."""
    layer, base, leaf = name.partition(".base_layer.")
    return f"{layer}.{leaf}" if base and adapter not in model.get_submodule(layer).r else name


def kept_parts(config: FlamingoConfig) -> list[str]:
    """The parts of the bridge that the adapter holds whole; a bridge that started from nothing is held whole."""
    return list(BRIDGE) if config.adapter_parts is None else config.adapter_parts


def name_in_file(name: str, adapter: str = ADAPTER) -> str:
    """A parameter's name as PEFT keeps it: without the adapter's own name."""
    if not is_lora(name):
        return name
    plain = name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
    return plain.removesuffix(".weight") if "lora_magnitude_vector" in plain else plain
