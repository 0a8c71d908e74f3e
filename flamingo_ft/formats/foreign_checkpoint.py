"""Recognize which Flamingo wrote a checkpoint, and map its tensors to the names used here.

OpenFlamingo and its descendants wrap the language model's layers:
``lang_encoder.<layers>.{k}.gated_cross_attn_layer.*`` beside ``lang_encoder.<layers>.{k}.decoder_layer.*``.
Here the language model keeps its own names, and cross-attention is ``gated_cross_attn_layers.{k}.*``. The
formats were read off the code of open-flamingo 0.0.2 and 2.0.1 (arXiv:2308.01390), Otter (arXiv:2305.03726)
and Multimodal-GPT (arXiv:2305.04790).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from flamingo_ft.errors import UserError

from .key_names import (
    EARLIER_GPT_NEOX_HEAD,
    GPT_NEOX_HEAD,
    GPT_NEOX_LAYERS,
    VISION_PREFIX,
    from_otter_name,
    is_lora_name,
    is_otter_name,
    lora_file_name,
    stored_lora_alpha,
    strip_peft_wrapper,
    to_open_clip,
)
from .stored_files import StoredTensors, first_few, read_checkpoint_files, unwrap_state_dict

Visibility = Literal["immediate", "following"]
OPEN_FLAMINGO, OPEN_FLAMINGO_1 = "OpenFlamingo v2", "OpenFlamingo v1"
OTTER, MULTIMODAL_GPT = "Otter", "Multimodal-GPT"

_CROSS_ATTENTION = re.compile(
    r"lang_encoder\.(?P<layers>.+)\.(?P<k>\d+)\.gated_cross_attn_layer\.(?P<rest>.+)"
)
_DECODER_LAYER = re.compile(r"lang_encoder\.(?P<layers>.+)\.(?P<k>\d+)\.decoder_layer\.(?P<rest>.+)")
# OpenFlamingo registers these modules a second time, under a second name.
_CROSS_ATTENTION_ALIAS = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(?P<k>\d+)\.(?P<rest>.+)")
_DECODER_LAYER_ALIAS = re.compile(r"lang_encoder\.old_decoder_blocks\.(?P<k>\d+)\.(?P<rest>.+)")
_PERCEIVER = "perceiver."
BRIDGE_PREFIXES = (_PERCEIVER, "gated_cross_attn_layers.")

# Buffers that earlier versions of transformers saved and today's compute when the model is built.
RECOMPUTED_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.masked_bias|attention\.bias|attn\.bias)$")

HEAD_WIDTH = 64  # in all released Flamingos; the matrices show only heads times this


@dataclass
class ForeignCheckpoint:
    """A checkpoint of another Flamingo, under the names used here.

    format: which project wrote it. path: where it was read.
    decoder_layers: path of the decoder layers in its language model; None if no key shows it.
    visibility: which media its text tokens were trained to attend to.
    bridge: perceiver and cross-attention. language, vision: what it holds of the backbones.
    lora: LoRA weights, named as in PEFT's files. lora_alpha: None if the checkpoint does not record it.
    skipped: keys of the file that hold nothing new, with the reason.
    config: the config.json beside it. wrapping: how the state dict was wrapped in its file, in words.
    """

    format: str
    path: Path
    decoder_layers: str | None = None
    visibility: Visibility = "immediate"
    bridge: dict[str, Tensor] = field(default_factory=dict)
    language: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, Tensor] = field(default_factory=dict)
    lora_alpha: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    wrapping: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors but LoRA's."""
        return self.bridge | self.language | self.vision


def read_checkpoint(path: Path) -> ForeignCheckpoint:
    """Read a checkpoint's file or folder. Raises UserError for an unknown format."""
    return parse_checkpoint(read_checkpoint_files(path))


def parse_checkpoint(stored: StoredTensors | Mapping[str, Any]) -> ForeignCheckpoint:
    """Parse a state dict, or what was read from files. Raises UserError for an unknown format."""
    if not isinstance(stored, StoredTensors):
        stored = unwrap_state_dict(stored, Path("state dict"))
    names = [strip_peft_wrapper(name) for name in stored.tensors]
    checkpoint = ForeignCheckpoint(
        _recognize_format(stored, names),
        stored.path,
        decoder_layers=_find_decoder_layers(names),
        lora_alpha=stored_lora_alpha(stored.extras, stored.config),
        config=stored.config,
        wrapping=stored.wrapping,
    )
    if checkpoint.format in (OPEN_FLAMINGO_1, MULTIMODAL_GPT):
        checkpoint.visibility = "following"
    for name, (original, tensor) in zip(names, stored.tensors.items(), strict=True):
        _add_tensor(checkpoint, name, original, tensor)
    if checkpoint.format == OTTER:
        checkpoint.vision = to_open_clip(checkpoint.vision, checkpoint.skipped)
    return checkpoint


def has_wrapped_layers(names: Iterable[str]) -> bool:
    """Return whether keys are of a language model whose layers OpenFlamingo (or a descendant) wrapped."""
    bare = [strip_peft_wrapper(name) for name in names]
    return any(_CROSS_ATTENTION.fullmatch(name) or _CROSS_ATTENTION_ALIAS.fullmatch(name) for name in bare)


def _find_decoder_layers(names: list[str]) -> str | None:
    for name in names:
        match = _CROSS_ATTENTION.fullmatch(name) or _DECODER_LAYER.fullmatch(name)
        if match:
            return match["layers"]
    return None


def _recognize_format(stored: StoredTensors, names: list[str]) -> str:
    if any(name.startswith("token_rows.") for name in names):
        raise UserError(
            f"{stored.path}: already in flamingo-ft's format; export it from its folder with --to"
        )
    if any(is_otter_name(name) for name in names) or stored.config.get("model_type") == "otter":
        return OTTER
    if any(is_lora_name(name) for name in names):
        return MULTIMODAL_GPT
    if not any(name.startswith(_PERCEIVER) for name in names) and not has_wrapped_layers(names):
        raise UserError(
            f"{stored.path}: not a checkpoint of a known format, got keys such as {first_few(names)}; "
            "give one of OpenFlamingo (v1 or v2), Otter or Multimodal-GPT"
        )
    # Version 1's training saved the alias of the cross-attention; both aliases are in an unfiltered state
    # dict.
    has_cross_attention_alias = any(_CROSS_ATTENTION_ALIAS.fullmatch(name) for name in names)
    has_decoder_layer_alias = any(_DECODER_LAYER_ALIAS.fullmatch(name) for name in names)
    return OPEN_FLAMINGO_1 if has_cross_attention_alias and not has_decoder_layer_alias else OPEN_FLAMINGO


def _add_tensor(checkpoint: ForeignCheckpoint, name: str, original: str, tensor: Tensor) -> None:
    """Add one tensor to the part of the checkpoint that it belongs to.

    name: its key without PEFT's wrapper; original: its key in the file.
    """
    name = from_otter_name(name) if checkpoint.format == OTTER else name
    name = _unwrapped_name(checkpoint, name)
    if is_lora_name(name):
        checkpoint.lora[lora_file_name(name)] = tensor
        return
    if name.startswith(VISION_PREFIX):
        checkpoint.vision[name] = tensor
        return
    part = checkpoint.bridge if name.startswith(BRIDGE_PREFIXES) else checkpoint.language
    if name not in part:
        part[name] = tensor
    elif part[name].equal(tensor):
        checkpoint.skipped[original] = "repeats a tensor under a second name"
    else:
        raise UserError(
            f"{checkpoint.path}: {original} is stored under two names with different values; save it again"
        )


def _unwrapped_name(checkpoint: ForeignCheckpoint, name: str) -> str:
    """Return the name used here for a key of wrapped layers or of transformers 4; others stay as they are."""
    if match := _CROSS_ATTENTION_ALIAS.fullmatch(name) or _CROSS_ATTENTION.fullmatch(name):
        return f"gated_cross_attn_layers.{match['k']}.{match['rest']}"
    if match := _DECODER_LAYER.fullmatch(name):
        return f"lang_encoder.{match['layers']}.{match['k']}.{match['rest']}"
    if (match := _DECODER_LAYER_ALIAS.fullmatch(name)) and checkpoint.decoder_layers:
        return f"lang_encoder.{checkpoint.decoder_layers}.{match['k']}.{match['rest']}"
    if name == EARLIER_GPT_NEOX_HEAD and checkpoint.decoder_layers == GPT_NEOX_LAYERS:
        return GPT_NEOX_HEAD
    return name


# --- The bridge's hyperparameters, read off the shapes of its tensors


@dataclass(frozen=True)
class BridgeShape:
    """Hyperparameters of a bridge.

    cross_attn_every_n_layers: one cross-attention block for this many decoder layers. blocks: the layers that
        have one.
    lm_width: of the language model. vis_dim: of the tower's tokens.
    perceiver, cross_attention: arguments of `PerceiverResampler` and `GatedCrossAttentionBlock` other than
        widths.
    """

    cross_attn_every_n_layers: int
    blocks: tuple[int, ...]
    lm_width: int
    vis_dim: int
    perceiver: dict[str, Any]
    cross_attention: dict[str, Any]


def bridge_shape(bridge: Mapping[str, Tensor], path: object) -> BridgeShape:
    """Read the hyperparameters off a whole bridge.

    Raises UserError, naming ``path``, if parts are missing, if the number of heads is not clear, or if the
    blocks are not at a regular interval.
    """
    try:
        return _bridge_shape(bridge, path)
    except (KeyError, IndexError):
        raise UserError(
            f"{path}: the checkpoint holds no whole bridge; give one with perceiver and cross-attention"
        ) from None


def _bridge_shape(bridge: Mapping[str, Tensor], path: object) -> BridgeShape:
    blocks = _indices(bridge, r"gated_cross_attn_layers\.(\d+)\.")
    interval = blocks[0] + 1
    if blocks != list(range(blocks[0], blocks[-1] + 1, interval)):
        raise UserError(
            f"{path}: cross-attention must be at a regular interval, got blocks before layers {blocks}; "
            "such a bridge cannot be loaded"
        )
    latents = bridge["perceiver.latents"]
    query = bridge[f"gated_cross_attn_layers.{blocks[0]}.attn.to_q.weight"]
    feed_forward = bridge[f"gated_cross_attn_layers.{blocks[0]}.ff.1.weight"]
    perceiver = {
        "num_latents": len(latents),
        "depth": 1 + max(_indices(bridge, r"perceiver\.layers\.(\d+)\."), default=-1),
        **_heads(bridge["perceiver.layers.0.0.to_q.weight"], path),
        "ff_mult": len(bridge["perceiver.layers.0.1.1.weight"]) // latents.shape[1],
    }
    embeddings = {"max_num_media": "perceiver.media_time_embs", "max_num_frames": "perceiver.frame_embs"}
    perceiver |= {key: len(bridge[name]) for key, name in embeddings.items() if name in bridge}
    cross_attention = {**_heads(query, path), "ff_mult": len(feed_forward) // feed_forward.shape[1]}
    return BridgeShape(interval, tuple(blocks), query.shape[1], latents.shape[1], perceiver, cross_attention)


def _indices(bridge: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Return the numbers that ``pattern`` captures at the beginning of keys, each once and in order."""
    matches = (re.match(pattern, name) for name in bridge)
    return sorted({int(match[1]) for match in matches if match})


def _heads(query: Tensor, path: object) -> dict[str, int]:
    if len(query) % HEAD_WIDTH:
        raise UserError(
            f"{path}: the width of attention must be a multiple of {HEAD_WIDTH} (one head in all Flamingos), "
            f"got {len(query)}; such a bridge cannot be loaded"
        )
    return {"heads": len(query) // HEAD_WIDTH, "dim_head": HEAD_WIDTH}
