"""Otter's names (arXiv:2305.03726): OpenFlamingo's with the parts of its perceiver and feed-forward layers named."""

from __future__ import annotations

import re

ANSWER_TOKEN = "<answer>"  # Otter's own, behind the two of every Flamingo

# Its names and OpenFlamingo's; attention is entry 0 of a perceiver layer, feed-forward entry 1.
_PERCEIVER_FF = re.compile(r"^perceiver\.layers\.(\d+)\.feed_forward\.")
_PERCEIVER_ATTENTION = re.compile(r"^perceiver\.layers\.(\d+)\.(norm_media|norm_latents|to_q|to_kv|to_out)\.")
_BLOCK_FF = re.compile(r"(\.gated_cross_attn_layer|^gated_cross_attn_layers\.\d+)\.feed_forward\.")


def is_its_own(name: str) -> bool:
    """Whether a name is Otter's and not OpenFlamingo's."""
    return bool(_PERCEIVER_FF.match(name) or _PERCEIVER_ATTENTION.match(name) or _BLOCK_FF.search(name))


def renamed(name: str) -> str:
    """OpenFlamingo's name for one of Otter's."""
    name = _PERCEIVER_FF.sub(r"perceiver.layers.\1.1.", name)
    name = _PERCEIVER_ATTENTION.sub(r"perceiver.layers.\1.0.\2.", name)
    return _BLOCK_FF.sub(r"\1.ff.", name)


def to_otter(name: str) -> str:
    """The inverse of `renamed`."""
    name = re.sub(r"^perceiver\.layers\.(\d+)\.1\.", r"perceiver.layers.\1.feed_forward.", name)
    name = re.sub(r"^perceiver\.layers\.(\d+)\.0\.", r"perceiver.layers.\1.", name)
    return re.sub(
        r"(\.gated_cross_attn_layer|^gated_cross_attn_layers\.\d+)\.ff\.", r"\1.feed_forward.", name
    )
