"""Structure of a causal language model: its decoder layers, their hidden states, and its context length.

A Flamingo hooks the decoder layers of a language model without changing it. In nearly every family of
transformers they are the one `ModuleList` with as many entries as the configuration has hidden layers. The
tables below, keyed on `config.model_type`, cover the exceptions.

Shapes: B samples, T text tokens, S residual streams, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flamingo_ft.errors import UserError

OVERRIDE = "decoder_layers_attr_name"

# Families whose list is not as long as their configuration says.
DECODER_LAYERS = {
    "blt": "model.local_decoder.layers",  # on bytes; its global transformer runs on patches of them
    "hrm_text": "model.H_module.layers",  # num_hidden_layers counts every cycle over the same layers
    "longcat_flash": "model.layers",  # two attentions per layer, and num_hidden_layers counts those
}

# Families in which cross-attention before a decoder layer would be silently wrong, without an override.
UNSUPPORTED = {
    "cpmant": "its layers read a learned prompt before the text, so their positions are not those of tokens",
    "mllama": "it skips its own cross-attention layers, so a bridge before them would never run",
    "prophetnet": "its layers read several streams of the text concatenated",
    "reformer": "its reversible layers run backward without hooks, so the bridge would get no gradient",
    "xlm": "it has no decoder layers, only parallel lists of their parts",
    "xlnet": "its layers read (tokens, samples, width) and permuted text",
}

# Names of the layer count, in order of precedence: decoders taken out of an encoder-decoder have two.
LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")

CONTEXT_LENGTHS = ("max_position_embeddings", "max_seq_len")  # MPT and DBRX use the second
NO_CONTEXT_LIMIT = 2**31  # context of a language model whose configuration gives none


@dataclass(frozen=True)
class ResidualStreams:
    """How a family with S > 1 residual streams lays them out between its decoder layers.

    layout: "outer" (S, B, T, D), "inner" (B, T, S, D) or "flat" (B, T, S * D). count: S.
    """

    layout: Literal["outer", "inner", "flat"]
    count: int

    def mean(self, hidden_states: Tensor) -> Tensor:
        """Return the mean of the streams (B, T, D), which a cross-attention block reads."""
        if self.layout == "flat":
            return hidden_states.unflatten(-1, (self.count, -1)).mean(-2)
        return hidden_states.mean(0 if self.layout == "outer" else 2)

    def add(self, hidden_states: Tensor, update: Tensor) -> Tensor:
        """Add a block's update (B, T, D) to every stream."""
        if self.layout == "flat":
            return hidden_states + update.repeat(1, 1, self.count)
        return hidden_states + update.unsqueeze(0 if self.layout == "outer" else 2)


# Keyed on the text configuration's model type: the layout, and the configuration key that holds S.
RESIDUAL_STREAMS: dict[str, tuple[Literal["outer", "inner", "flat"], str]] = {
    "gemma3n_text": ("outer", "altup_num_inputs"),  # AltUp, arXiv:2301.13310
    "deepseek_v4": ("inner", "hc_mult"),  # hyper-connections, arXiv:2409.19606
    "hy_v4": ("inner", "hc_mult"),
    "qwen4_exp_text": ("flat", "hc_count"),
}


def find_decoder_layers(lm: PreTrainedModel, override: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return the dotted path of the decoder layers in ``lm``, and the layers.

    override: that path, given by the user as `decoder_layers_attr_name`; takes precedence.

    The index of a layer is its position in this list, which need not have `num_hidden_layers` entries. Raises
    UserError for an override that is not a list of layers, for an unsupported family, and if no list or
    several lists match.
    """
    if override is not None:
        return override, _layers_at(lm, override)
    model_type = lm.config.model_type
    if model_type in UNSUPPORTED:
        raise UserError(
            f"a {model_type} language model cannot carry the cross-attention: {UNSUPPORTED[model_type]}; "
            f"choose another language model, or name its layers with {OVERRIDE}"
        )
    if model_type in DECODER_LAYERS:
        path = DECODER_LAYERS[model_type]
        return path, _layers_at(lm, path)
    candidates = _candidates(lm)
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    matches = " and ".join(repr(path) for path in candidates) or "none"
    raise UserError(
        f"cannot find the decoder layers of {type(lm).__name__} (type {model_type!r}): expected one list "
        f"with an entry for each, got {matches}; set {OVERRIDE}: {_hint(lm)}"
    )


def hidden_size(config: PreTrainedConfig) -> int:
    """Return D, the width of one residual stream between decoder layers.

    It is not always that of the embeddings, which some families (OPT-350m, ELECTRA, RemBERT) project.
    """
    if config.model_type == "blt":
        return config.decoder_config.hidden_size
    return _text_config(config).hidden_size


def residual_streams(config: PreTrainedConfig) -> ResidualStreams | None:
    """Return how the residual streams are laid out; None for the usual single stream (B, T, D)."""
    text = _text_config(config)
    if text.model_type not in RESIDUAL_STREAMS:
        return None
    layout, count_key = RESIDUAL_STREAMS[text.model_type]
    return ResidualStreams(layout, getattr(text, count_key))


def context_length(config: PreTrainedConfig) -> int:
    """Return the context length in tokens; `NO_CONTEXT_LIMIT` for a model without one."""
    text = config.get_text_config()
    for name in CONTEXT_LENGTHS:
        length = getattr(text, name, None)
        if length:
            return length
    return NO_CONTEXT_LIMIT


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config(decoder=True)


def _layers_at(lm: PreTrainedModel, path: str) -> nn.ModuleList:
    try:
        layers = lm.get_submodule(path)
    except AttributeError as error:
        problem = f"{OVERRIDE} {path!r} does not exist in {type(lm).__name__}"
        raise UserError(f"{problem}: {error}; {_hint(lm)}") from None
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(
            f"{OVERRIDE} {path!r} is a {type(layers).__name__} in {type(lm).__name__}, not a list of layers; "
            f"{_hint(lm)}"
        )
    return layers


def _hint(lm: PreTrainedModel) -> str:
    """Return the lists that an override could name, longest first, in words."""
    lists = sorted(_module_lists(lm).items(), key=lambda item: -len(item[1]))
    if not lists:
        return "it has no ModuleList, so choose another language model"
    shown = ", ".join(f"{path!r} ({len(layers)} entries)" for path, layers in lists[:4])
    return f"its lists of modules are {shown}"


def _module_lists(lm: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Return every ModuleList by its path, without those inside another ModuleList."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in lm.named_modules():
        is_nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not is_nested:
            lists[path] = module
    return lists


def _candidates(lm: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Return the lists with as many entries as the model has layers, outside vision and audio towers."""
    text = _text_config(lm.config)
    counts = (getattr(text, name, None) for name in LAYER_COUNTS)
    depth = next((count for count in counts if isinstance(count, int)), None)
    text_types = (type(text), type(lm.config))
    return {
        path: layers
        for path, layers in _module_lists(lm).items()
        if len(layers) == depth and type(_enclosing_config(lm, path)) in text_types
    }


def _enclosing_config(lm: PreTrainedModel, path: str) -> PreTrainedConfig:
    """Return the configuration of the innermost model around ``path``: a tower has one of its own."""
    parents = path.split(".")[:-1]
    for depth in range(len(parents), 0, -1):
        config = getattr(lm.get_submodule(".".join(parents[:depth])), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return lm.config
