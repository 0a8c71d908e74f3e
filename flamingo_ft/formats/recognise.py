"""Which Flamingo wrote a checkpoint, and its tensors under this package's names.

OpenFlamingo and all that grew from it wrap the language model's layers: ``lang_encoder.<layers>.{k}.gated_cross_attn_layer.*``
beside ``lang_encoder.<layers>.{k}.decoder_layer.*``. Here the language model keeps its own names, and the cross-attention
lies in ``gated_cross_attn_layers.{k}.*``. Facts of the formats were read in the code of open-flamingo 0.0.2 and 2.0.1
(arXiv:2308.01390), Otter (arXiv:2305.03726) and Multimodal-GPT (arXiv:2305.04790).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from flamingo_ft.errors import UserError

from . import clip, otter, updates
from .stored import Stored, read_stored, some, unwrap

OPEN_FLAMINGO, OPEN_FLAMINGO_1 = "OpenFlamingo v2", "OpenFlamingo v1"
OTTER, MULTIMODAL_GPT = "Otter", "Multimodal-GPT"

_BLOCK = re.compile(r"lang_encoder\.(?P<layers>.+)\.(?P<k>\d+)\.gated_cross_attn_layer\.(?P<rest>.+)")
_BLOCK_AGAIN = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(?P<k>\d+)\.(?P<rest>.+)")
_LAYER = re.compile(r"lang_encoder\.(?P<layers>.+)\.(?P<k>\d+)\.decoder_layer\.(?P<rest>.+)")
_LAYER_AGAIN = re.compile(r"lang_encoder\.old_decoder_blocks\.(?P<k>\d+)\.(?P<rest>.+)")
_PERCEIVER = "perceiver."
BRIDGE = (_PERCEIVER, "gated_cross_attn_layers.")

# Buffers of the language models of earlier versions of transformers, which today's make themselves.
MADE_ANEW = re.compile(r".*(rotary_emb\.inv_freq|\.masked_bias|attention\.bias|attn\.bias)$")


@dataclass
class Checkpoint:
    """A foreign checkpoint under this package's names.

    layers: path of the decoder layers in its language model, None where no name tells. bridge: perceiver and
    cross-attention; language and vision: what it holds of the backbones; lora: updates, as PEFT names them, with their
    lora_alpha where that is known. visibility: which media its text was trained to see. left_out: names of the file that
    say nothing new, with the reason.
    """

    format: str
    where: Path
    layers: str | None = None
    visibility: Literal["immediate", "following"] = "immediate"
    bridge: dict[str, Tensor] = field(default_factory=dict)
    language: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, Tensor] = field(default_factory=dict)
    lora_alpha: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """All but the updates."""
        return self.bridge | self.language | self.vision


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and recognise a checkpoint's file or folder; UserError for what is none of the known formats."""
    return parse(read_stored(path))


def parse(stored: Stored | Mapping[str, Any]) -> Checkpoint:
    """Recognise what was read, or a state dict."""
    stored = stored if isinstance(stored, Stored) else unwrap(stored, Path("state dict"))
    names = [updates.without_wrapper(name) for name in stored.tensors]
    found = Checkpoint(_format(stored, names), stored.where, config=stored.config, wrapped=stored.wrapped)
    layers = (
        match["layers"] for name in names if (match := _BLOCK.fullmatch(name) or _LAYER.fullmatch(name))
    )
    found.layers = next(layers, None)
    found.visibility = "following" if found.format in (OPEN_FLAMINGO_1, MULTIMODAL_GPT) else "immediate"
    found.lora_alpha = updates.alpha_of(stored.beside, stored.config)
    for name, (original, tensor) in zip(names, stored.tensors.items(), strict=True):
        _sort_in(found, name, original, tensor)
    if found.format == OTTER:
        found.vision = clip.to_open_clip(found.vision, found.left_out)
    return found


def is_foreign_checkpoint(names: Mapping[str, Any] | list[str]) -> bool:
    """Whether names are those of one of these formats, in which the language model's layers are wrapped."""
    bare = [updates.without_wrapper(name) for name in names]
    return any(_BLOCK.fullmatch(name) or _BLOCK_AGAIN.fullmatch(name) for name in bare)


def _format(stored: Stored, names: list[str]) -> str:
    if any(name.startswith("token_rows.") for name in names):
        raise UserError(f"{stored.where}: is of this package already; write it for others from its folder")
    has_lora = any(updates.is_update(name) for name in names)
    if any(otter.is_its_own(name) for name in names) or stored.config.get("model_type") == "otter":
        return OTTER
    if has_lora:
        return MULTIMODAL_GPT
    if not any(name.startswith(_PERCEIVER) for name in names) and not is_foreign_checkpoint(names):
        raise UserError(
            f"{stored.where}: no checkpoint of a known format: it has names such as {some(names)}; known are OpenFlamingo's "
            "v1 and v2, Otter's and Multimodal-GPT's"
        )
    twice, whole = (
        any(pattern.fullmatch(name) for name in names) for pattern in (_BLOCK_AGAIN, _LAYER_AGAIN)
    )
    return OPEN_FLAMINGO_1 if twice and not whole else OPEN_FLAMINGO


def _sort_in(found: Checkpoint, name: str, original: str, tensor: Tensor) -> None:
    """Put one tensor where it belongs, under its name here."""
    name = otter.renamed(name) if found.format == OTTER else name
    own = _own_name(found, name)
    if updates.is_update(own):
        found.lora[updates.plain(own)] = tensor
    elif own.startswith(BRIDGE):
        _add(found.bridge, own, original, tensor, found)
    elif own.startswith("vision_encoder."):
        found.vision[own] = tensor
    else:
        _add(found.language, own, original, tensor, found)


def _add(part: dict[str, Tensor], own: str, original: str, tensor: Tensor, found: Checkpoint) -> None:
    """A tensor that may be there under two names, but must be the same under both."""
    if own not in part:
        part[own] = tensor
        return
    if not part[own].equal(tensor):
        raise UserError(
            f"{found.where}: {original} is there under two names with different content; save it again"
        )
    found.left_out[original] = "is there under another name too"


def _own_name(found: Checkpoint, name: str) -> str:
    """The name here."""
    if match := _BLOCK_AGAIN.fullmatch(name) or _BLOCK.fullmatch(name):
        return f"gated_cross_attn_layers.{match['k']}.{match['rest']}"
    if match := _LAYER.fullmatch(name):
        return f"lang_encoder.{match['layers']}.{match['k']}.{match['rest']}"
    if (match := _LAYER_AGAIN.fullmatch(name)) and found.layers:
        return f"lang_encoder.{found.layers}.{match['k']}.{match['rest']}"
    return name
