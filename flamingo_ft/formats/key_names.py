"""Map state-dict keys of other projects: Otter's bridge, PEFT's LoRA, transformers' CLIP tower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.errors import UserError

# --- transformers

# GPT-NeoX's output head in transformers 4, and so in the released OpenFlamingo-4B.
GPT_NEOX_LAYERS = "gpt_neox.layers"
GPT_NEOX_HEAD, EARLIER_GPT_NEOX_HEAD = "lang_encoder.lm_head.weight", "lang_encoder.embed_out.weight"

# --- Otter (arXiv:2305.03726): OpenFlamingo's keys, with names for the entries of its nn.ModuleLists

ANSWER_TOKEN = "<answer>"  # Otter adds it after the two tokens of every Flamingo

# A perceiver layer is [attention, feed-forward] in OpenFlamingo; Otter flattens the first and names the
# second.
_PERCEIVER_FF = re.compile(r"^perceiver\.layers\.(\d+)\.feed_forward\.")
_PERCEIVER_ATTENTION = re.compile(r"^perceiver\.layers\.(\d+)\.(norm_media|norm_latents|to_q|to_kv|to_out)\.")
_CROSS_ATTENTION_FF = re.compile(r"(\.gated_cross_attn_layer|^gated_cross_attn_layers\.\d+)\.feed_forward\.")


def is_otter_name(name: str) -> bool:
    """Return whether a key occurs in Otter's checkpoints and not in OpenFlamingo's."""
    patterns = (_PERCEIVER_FF, _PERCEIVER_ATTENTION, _CROSS_ATTENTION_FF)
    return any(pattern.search(name) for pattern in patterns)


def from_otter_name(name: str) -> str:
    """Return OpenFlamingo's key for one of Otter's."""
    name = _PERCEIVER_FF.sub(r"perceiver.layers.\1.1.", name)
    name = _PERCEIVER_ATTENTION.sub(r"perceiver.layers.\1.0.\2.", name)
    return _CROSS_ATTENTION_FF.sub(r"\1.ff.", name)


def to_otter_name(name: str) -> str:
    """Invert `from_otter_name`."""
    name = re.sub(r"^perceiver\.layers\.(\d+)\.1\.", r"perceiver.layers.\1.feed_forward.", name)
    name = re.sub(r"^perceiver\.layers\.(\d+)\.0\.", r"perceiver.layers.\1.", name)
    pattern = r"(\.gated_cross_attn_layer|^gated_cross_attn_layers\.\d+)\.ff\."
    return re.sub(pattern, r"\1.feed_forward.", name)


# --- LoRA of a language model that PEFT had wrapped

# PEFT < 0.3 wrote `lora_A.weight`, later versions `lora_A.default.weight`. Since 0.6 the adapted layer is
# called `base_layer`.
_LORA_WEIGHT = re.compile(r"\.lora_(?P<which>[AB])(\.\w+)?\.weight$")
_PEFT_WRAPPER = re.compile(r"^lang_encoder\.base_model\.model\.")
_TUNING_CONFIG = (
    "tuning_config"  # Multimodal-GPT keeps rank and alpha here, Otter in config.json's lora_config
)


def strip_peft_wrapper(name: str) -> str:
    """Return a key without the components that PEFT's wrapping added."""
    return _PEFT_WRAPPER.sub("lang_encoder.", name).replace(".base_layer.", ".")


def is_lora_name(name: str) -> bool:
    """Return whether a key belongs to LoRA."""
    return ".lora_" in name


def lora_file_name(name: str) -> str:
    """Return the key as PEFT writes it to a file, without the name of the adapter."""
    return _LORA_WEIGHT.sub(r".lora_\g<which>.weight", name)


def stored_lora_alpha(extras: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """Return lora_alpha if the checkpoint file or the config.json beside it records it."""
    settings = extras.get(_TUNING_CONFIG) or config.get("lora_config") or {}
    settings = settings.get(_TUNING_CONFIG, settings) if isinstance(settings, Mapping) else {}
    alpha = settings.get("lora_alpha")
    return float(alpha) if isinstance(alpha, (int, float)) else None


# --- The vision tower: CLIPVisionModel (in Otter's checkpoints) and OpenCLIP. The weights are the same, but
# --- transformers keeps query, key and value apart and OpenCLIP stacks them.

VISION_PREFIX, CLIP_VISION_PREFIX = "vision_encoder.", "vision_encoder.vision_model."
UNUSED_PROJECTION = (
    "proj"  # OpenCLIP's projection of the pooled token, which the spatial tokens do not pass through
)

_CLIP_TO_OPEN_CLIP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_CLIP_TO_OPEN_CLIP_IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_TO_CLIP = {ours: theirs for theirs, ours in _CLIP_TO_OPEN_CLIP.items()}
_OPEN_CLIP_TO_CLIP_IN_LAYER = {ours: theirs for theirs, ours in _CLIP_TO_OPEN_CLIP_IN_LAYER.items()}
_CLIP_LAYER = re.compile(r"encoder\.layers\.(?P<k>\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)")
_CLIP_PROJECTION = re.compile(r"self_attn\.(?P<which>[qkv])_proj")
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(?P<k>\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)")
_OPEN_CLIP_IN_PROJ = re.compile(r"transformer\.resblocks\.(?P<k>\d+)\.attn\.in_proj_(?P<leaf>weight|bias)")
_POSITION_IDS = "embeddings.position_ids"  # a buffer that transformers saved before 4.31


def to_open_clip(tensors: Mapping[str, Tensor], skipped: dict[str, str]) -> dict[str, Tensor]:
    """Rename ``vision_encoder.*`` of a CLIPVisionModel to OpenCLIP's keys.

    Keys that carry no weights are added to ``skipped`` with the reason; unknown ones are returned as they
    are, so that loading reports them. Raises UserError when the query, key or value of a layer is missing.
    """
    renamed: dict[str, Tensor] = {}
    in_proj: dict[str, dict[str, Tensor]] = {}  # OpenCLIP's key: {"q": ..., "k": ..., "v": ...}
    for name, tensor in tensors.items():
        bare = name.removeprefix(CLIP_VISION_PREFIX).removeprefix(VISION_PREFIX)
        layer = _CLIP_LAYER.fullmatch(bare)
        projection = _CLIP_PROJECTION.fullmatch(layer["module"]) if layer else None
        block = f"{VISION_PREFIX}transformer.resblocks.{layer['k']}." if layer else ""
        if bare in _CLIP_TO_OPEN_CLIP:
            renamed[VISION_PREFIX + _CLIP_TO_OPEN_CLIP[bare]] = tensor
        elif layer and layer["module"] in _CLIP_TO_OPEN_CLIP_IN_LAYER:
            renamed[f"{block}{_CLIP_TO_OPEN_CLIP_IN_LAYER[layer['module']]}.{layer['leaf']}"] = tensor
        elif layer and projection:
            stacked = in_proj.setdefault(f"{block}attn.in_proj_{layer['leaf']}", {})
            stacked[projection["which"]] = tensor
        elif bare == _POSITION_IDS:
            skipped[name] = "follows from the architecture"
        else:
            renamed[name] = tensor
    return renamed | {name: _stack_qkv(name, parts) for name, parts in in_proj.items()}


def _stack_qkv(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    missing = [which for which in "qkv" if which not in parts]
    if missing:
        raise UserError(f"checkpoint's tower lacks {', '.join(missing)} of {name}; give the whole checkpoint")
    return torch.cat([parts[which] for which in "qkv"])


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `to_open_clip`, without the unused projection. Raises KeyError for anything but a CLIP ViT."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(VISION_PREFIX)
        in_proj, block = _OPEN_CLIP_IN_PROJ.fullmatch(bare), _OPEN_CLIP_BLOCK.fullmatch(bare)
        if bare in _OPEN_CLIP_TO_CLIP:
            renamed[CLIP_VISION_PREFIX + _OPEN_CLIP_TO_CLIP[bare]] = tensor
        elif in_proj:
            attention = f"{CLIP_VISION_PREFIX}encoder.layers.{in_proj['k']}.self_attn."
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{attention}{which}_proj.{in_proj['leaf']}"] = part.clone()
        elif block:
            module = _OPEN_CLIP_TO_CLIP_IN_LAYER[block["module"]]
            renamed[f"{CLIP_VISION_PREFIX}encoder.layers.{block['k']}.{module}.{block['leaf']}"] = tensor
        elif bare != UNUSED_PROJECTION:
            raise KeyError(f"a CLIPVisionModel has no counterpart of {name}")
    return renamed
