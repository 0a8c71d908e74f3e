"""CLIP's vision tower between transformers' names (Otter keeps those) and OpenCLIP's.

The two hold the same numbers; transformers has queries, keys and values apart, OpenCLIP one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flamingo_ft.errors import UserError

HERE, THERE = "vision_encoder.", "vision_encoder.vision_model."
_TOP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BACK = {own: theirs for theirs, own in _IN_LAYER.items()}
_LAYER = re.compile(r"encoder\.layers\.(?P<k>\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)")
_BLOCK = re.compile(r"transformer\.resblocks\.(?P<k>\d+)\.(?P<module>.+)\.(?P<leaf>weight|bias)")
_STACKED = re.compile(r"transformer\.resblocks\.(?P<k>\d+)\.attn\.in_proj_(?P<leaf>weight|bias)")
_QKV = ("q", "k", "v")
POSITIONS = "embeddings.position_ids"  # a buffer of earlier versions of transformers
NOT_USED = "proj"  # OpenCLIP's last projection, which the tokens of a Flamingo do not go through


def to_open_clip(tensors: Mapping[str, Tensor], left_out: dict[str, str]) -> dict[str, Tensor]:
    """``vision_encoder.*`` of a CLIPVisionModel under OpenCLIP's names; ``left_out`` hears of what has no place there."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(THERE).removeprefix(HERE)
        if bare in _TOP:
            found[HERE + _TOP[bare]] = tensor
        elif (match := _LAYER.fullmatch(bare)) and _has_place(match["module"]):
            _sort_in(found, stacks, match, tensor)
        elif bare == POSITIONS:
            left_out[name] = "follows from the architecture"
        else:
            found[name] = tensor  # for who puts it in place to find none
    for name, parts in stacks.items():
        if lacking := [which for which in _QKV if which not in parts]:
            raise UserError(
                f"checkpoint's tower lacks {', '.join(lacking)} of {name}; give the whole checkpoint"
            )
        found[name] = torch.cat([parts[which] for which in _QKV])
    return found


def _has_place(module: str) -> bool:
    return module in _IN_LAYER or module in [f"self_attn.{which}_proj" for which in _QKV]


def _sort_in(
    found: dict[str, Tensor], stacks: dict[str, dict[str, Tensor]], match: re.Match, tensor: Tensor
) -> None:
    block = f"{HERE}transformer.resblocks.{match['k']}."
    if own := _IN_LAYER.get(match["module"]):
        found[f"{block}{own}.{match['leaf']}"] = tensor
        return
    which = match["module"].removeprefix("self_attn.")[0]
    stacks.setdefault(f"{block}attn.in_proj_{match['leaf']}", {})[which] = tensor


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`, from names with ``vision_encoder.``; the last projection is left out."""
    top = {own: theirs for theirs, own in _TOP.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(HERE)
        if bare in top:
            found[THERE + top[bare]] = tensor
        elif match := _STACKED.fullmatch(bare):
            layer = f"{THERE}encoder.layers.{match['k']}.self_attn."
            parts = zip(_QKV, tensor.chunk(3), strict=True)
            found |= {f"{layer}{which}_proj.{match['leaf']}": part.clone() for which, part in parts}
        elif match := _BLOCK.fullmatch(bare):
            found[f"{THERE}encoder.layers.{match['k']}.{_BACK[match['module']]}.{match['leaf']}"] = tensor
        elif bare != NOT_USED:
            raise KeyError(f"no place for {name} in a CLIPVisionModel")
    return found
