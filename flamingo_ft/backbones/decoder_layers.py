"""Where a causal language model keeps its decoder layers, and what flows through them.

A Flamingo hooks the decoder layers of a language model that it leaves untouched, so it has to find them. In
nearly every family of transformers they are the one `ModuleList` with as many entries as the configuration
has hidden layers. The tables below, keyed on `config.model_type`, hold what that rule does not cover.

Shapes: B samples, T text tokens, S residual streams, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from flamingo_ft.errors import UserError

OVERRIDE = "decoder_layers_attr_name"

# Families whose list is not as long as their configuration says.
DECODER_LAYERS = {
    "blt": "model.local_decoder.layers",  # bytes; its global transformer runs on patches of them
    "hrm_text": "model.H_module.layers",  # num_hidden_layers counts every cycle over the same layers
    "longcat_flash": "model.layers",  # two attentions to a layer, and num_hidden_layers counts those
}

# Families that a bridge before a decoder layer silently does not fit. An explicit override is obeyed even so.
UNFIT = {
    "cpmant": "its layers read a learned prompt before the text, so their positions are not those of tokens",
    "mllama": "it skips its own cross-attention layers, so a bridge before them would never run",
    "prophetnet": "its layers read several streams of the text one behind the other",
    "reformer": "its reversible layers run backward without hooks, so the bridge would get no gradient",
    "xlm": "it has no decoder layers, only parallel lists of their parts",
    "xlnet": "its layers read (tokens, samples, width) and permuted text",
}

# Names of the layer count, the deciding one first: decoders taken out of an encoder-decoder have two.
LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")


@dataclass(frozen=True)
class ResidualStreams:
    """How a family with S > 1 residual streams lays them out between its decoder layers.

    layout: "outer" (S, B, T, D), "inner" (B, T, S, D) or "flat" (B, T, S * D).
    """

    layout: Literal["outer", "inner", "flat"]
    count: int

    def mean(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a block reads: the mean of the streams, (B, T, D)."""
        if self.layout == "flat":
            return hidden_states.unflatten(-1, (self.count, -1)).mean(-2)
        return hidden_states.mean(0 if self.layout == "outer" else 2)

    def add(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Add what a block changes, (B, T, D), to every stream."""
        if self.layout == "flat":
            return hidden_states + update.repeat(1, 1, self.count)
        return hidden_states + update.unsqueeze(0 if self.layout == "outer" else 2)


# Keyed on the text configuration's model type: the layout, and the field that holds S.
STREAMS = {
    "gemma3n_text": ("outer", "altup_num_inputs"),  # AltUp, arXiv:2301.13310
    "deepseek_v4": ("inner", "hc_mult"),  # hyper-connections, arXiv:2409.19606
    "hy_v4": ("inner", "hc_mult"),
    "qwen4_exp_text": ("flat", "hc_count"),
}


def find_decoder_layers(lm: nn.Module, override: str | None = None) -> tuple[str, nn.ModuleList]:
    """The decoder layers of `lm` and their dotted path in it.

    override: that path, given by the user as `decoder_layers_attr_name`; wins over everything else.

    The index of a layer is its place in this list, which need not have `num_hidden_layers` entries. Raises
    UserError when the override does not lead to layers, when the family is known not to fit, and when no list
    or several could be meant.
    """
    if override is not None:
        return override, _named(lm, override)
    model_type = lm.config.model_type
    if model_type in UNFIT:
        raise UserError(
            f"a {model_type} language model cannot carry the cross-attention: {UNFIT[model_type]}; "
            f"choose another language model, or name its layers with {OVERRIDE}"
        )
    if model_type in DECODER_LAYERS:
        path = DECODER_LAYERS[model_type]
        return path, _named(lm, path)
    return _only_one(lm, _candidates(lm))


def hidden_size(config: PreTrainedConfig) -> int:
    """D, the width of one residual stream between decoder layers.

    Not always that of the embeddings, which some families (OPT-350m, ELECTRA, RemBERT) project.
    """
    if config.model_type == "blt":
        return config.decoder_config.hidden_size
    return _text_config(config).hidden_size


def residual_streams(config: PreTrainedConfig) -> ResidualStreams | None:
    """How the residual streams are laid out, or None for the usual single one, (B, T, D)."""
    text = _text_config(config)
    if text.model_type not in STREAMS:
        return None
    layout, count = STREAMS[text.model_type]
    return ResidualStreams(layout, getattr(text, count))


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def _named(lm: nn.Module, path: str) -> nn.ModuleList:
    """The list of layers at `path`."""
    try:
        found = lm.get_submodule(path)
    except AttributeError as error:
        problem = f"{OVERRIDE} {path!r} leads nowhere in {type(lm).__name__}"
        raise UserError(f"{problem}: {error}; {_hint(lm)}") from None
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise UserError(
            f"{OVERRIDE} {path!r} is a {type(found).__name__} in {type(lm).__name__}, not a list of layers; "
            f"{_hint(lm)}"
        )
    return found


def _hint(lm: nn.Module) -> str:
    """The lists that an override could name, longest first."""
    lists = sorted(_module_lists(lm).items(), key=lambda item: -len(item[1]))
    if not lists:
        return "it holds no ModuleList at all, so choose another language model"
    shown = ", ".join(f"{path!r} ({len(layers)} entries)" for path, layers in lists[:4])
    return f"its lists of modules are {shown}"


def _module_lists(lm: nn.Module) -> dict[str, nn.ModuleList]:
    """Every ModuleList by its path, without those inside the entries of another."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in lm.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found[path] = module
    return found


def _candidates(lm: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists as long as the model is deep, outside vision and audio towers."""
    text = _text_config(lm.config)
    counts = (getattr(text, name, None) for name in LAYER_COUNTS)
    depth = next((count for count in counts if isinstance(count, int)), None)
    of_text = (type(text), type(lm.config))
    return {
        path: layers
        for path, layers in _module_lists(lm).items()
        if len(layers) == depth and type(_config_above(lm, path)) in of_text
    }


def _config_above(lm: nn.Module, path: str) -> PreTrainedConfig:
    """The configuration of the innermost model that `path` is part of: a tower has one of its own."""
    parents = path.split(".")[:-1]
    for depth in range(len(parents), 0, -1):
        config = getattr(lm.get_submodule(".".join(parents[:depth])), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return lm.config


def _only_one(lm: nn.Module, candidates: dict[str, nn.ModuleList]) -> tuple[str, nn.ModuleList]:
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    found = " and ".join(repr(path) for path in candidates) or "none"
    raise UserError(
        f"cannot tell where {type(lm).__name__} (type {lm.config.model_type!r}) keeps its decoder layers: "
        f"expected one list with an entry for each, found {found}; name it with {OVERRIDE}: {_hint(lm)}"
    )
