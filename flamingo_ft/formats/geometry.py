"""The shape of a bridge, read off its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flamingo_ft.errors import UserError

DIM_HEAD = 64  # of all released Flamingos; a matrix shows only heads times this
_LAYER = re.compile(r"perceiver\.layers\.(\d+)\.")
_BLOCK = re.compile(r"gated_cross_attn_layers\.(\d+)\.")


@dataclass(frozen=True)
class Geometry:
    """every: decoder layers to one cross-attention block; width: of the language model; vis_dim: of the tower's tokens;
    perceiver, cross_attention: the arguments of `PerceiverResampler` and `GatedCrossAttentionBlock` besides widths."""

    every: int
    blocks: tuple[int, ...]
    width: int
    vis_dim: int
    perceiver: dict[str, Any]
    cross_attention: dict[str, Any]


def geometry(bridge: Mapping[str, Tensor], where: object) -> Geometry:
    """The shape of a whole bridge. UserError where parts of it are missing or heads cannot be told."""
    try:
        return _geometry(bridge, where)
    except (KeyError, IndexError):
        raise UserError(
            f"{where}: the checkpoint holds no whole bridge; give one with perceiver and cross-attention"
        ) from None


def _geometry(bridge: Mapping[str, Tensor], where: object) -> Geometry:
    blocks = sorted({int(match[1]) for name in bridge if (match := _BLOCK.match(name))})
    depth = 1 + max((int(match[1]) for name in bridge if (match := _LAYER.match(name))), default=-1)
    latents, first = bridge["perceiver.latents"], f"gated_cross_attn_layers.{blocks[0]}."
    query, up = bridge[f"{first}attn.to_q.weight"], bridge[f"{first}ff.1.weight"]
    positions = {"max_num_media": "media_time_embs", "max_num_frames": "frame_embs"}
    learned = {
        key: len(bridge[f"perceiver.{name}"])
        for key, name in positions.items()
        if f"perceiver.{name}" in bridge
    }
    attention = _heads(bridge["perceiver.layers.0.0.to_q.weight"], where)
    perceiver = {"num_latents": len(latents), "depth": depth, **attention}
    perceiver["ff_mult"] = len(bridge["perceiver.layers.0.1.1.weight"]) // latents.shape[1]
    cross_attention = {**_heads(query, where), "ff_mult": len(up) // up.shape[1]}
    every = blocks[0] + 1
    if blocks != list(range(blocks[0], blocks[-1] + 1, every)):
        raise UserError(
            f"{where}: cross-attention before layers {blocks} is no regular interval; no Flamingo has that"
        )
    return Geometry(
        every, tuple(blocks), query.shape[1], latents.shape[1], perceiver | learned, cross_attention
    )


def _heads(query: Tensor, where: object) -> dict[str, int]:
    if len(query) % DIM_HEAD:
        raise UserError(
            f"{where}: attention of width {len(query)} is no multiple of {DIM_HEAD}, a head's width in all Flamingos"
        )
    return {"heads": len(query) // DIM_HEAD, "dim_head": DIM_HEAD}
