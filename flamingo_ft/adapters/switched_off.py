"""The model of an adapter as it is without the adapter, for comparison."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import in_parts, is_gate, is_lora
from flamingo_ft.model.token_rows import TokenRows

from .files import parts_in_adapter, read_flamingo_config
from .load import load_base, set_bridge_parameters


def base_bridge(
    folder: Path, model: FlamingoForConditionalGeneration, start: str | Path | None = None
) -> dict[str, Tensor]:
    """Return the tensors that the adapter in ``folder`` replaces in the bridge of its base.

    A bridge that was trained from scratch has no base: its gates are closed, and the rows of the tokens that
    it added are as before training, so that the language model is left alone. Loads the base once more if the
    adapter continues the training of its bridge. start: see `load_adapter`.
    """
    config = read_flamingo_config(folder)
    if not config.bridge_init:
        gates = {name: torch.zeros_like(gate) for name, gate in model.named_parameters() if is_gate(name)}
        return gates | _initial_rows(model)
    parts = parts_in_adapter(config)
    if not parts:
        return {}
    base = load_base(folder, start=start, device="cpu")
    return {
        name: parameter.detach()
        for name, parameter in base.named_parameters()
        if in_parts(name, parts) and not is_lora(name)
    }


def _initial_rows(model: FlamingoForConditionalGeneration) -> dict[str, Tensor]:
    """Return the rows of the added tokens as `build_flamingo` initializes them."""
    if model.token_rows is None:
        return {}
    rows = TokenRows(model.token_rows.token_ids, model.lang_encoder)
    rows.reset(model.lang_encoder, min(rows.token_ids))
    trained = dict(model.token_rows.named_parameters())
    return {
        f"token_rows.{name}": row.detach().to(trained[name].dtype) for name, row in rows.named_parameters()
    }


@contextmanager
def switched_off(model: FlamingoForConditionalGeneration, bridge: Mapping[str, Tensor]) -> Generator[None]:
    """Disable LoRA and put the tensors of `base_bridge` into the bridge inside the block."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].data for name in bridge}
    set_bridge_parameters(model, bridge)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        set_bridge_parameters(model, own)
