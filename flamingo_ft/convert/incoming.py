"""A foreign checkpoint and its backbones -> an adapter, or a whole model where the backbones themselves were changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.start import put_bridge, start_bridge
from flamingo_ft.atomic import folder_in_place
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.formats import Checkpoint, read_checkpoint
from flamingo_ft.formats.geometry import Geometry, geometry
from flamingo_ft.formats.otter import ANSWER_TOKEN
from flamingo_ft.formats.recognise import OTTER
from flamingo_ft.formats.stored import some
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.checkpoints import check_belongs

from .known import Backbones, backbones_for
from .report import Conversion, about
from .updates import add_updates
from .vocabulary import take_rows, vocabulary_names
from .whole import replace_tensors, save_whole

Target = Literal["auto", "adapter", "model"]

# Buffers of the language models of earlier transformers, which today's make themselves.
_MADE_ANEW = re.compile(r".*(rotary_emb\.inv_freq|\.masked_bias|attention\.bias|attn\.bias)$")


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    wanted: Backbones = Backbones(),
    *,
    to: Target = "auto",
    start: str | Path | None = None,
    lora_alpha: float | None = None,
) -> Conversion:
    """Bring a checkpoint of OpenFlamingo, Otter or Multimodal-GPT into this package's form, at ``out``.

    source: its file, its folder, or its name on the Hub. wanted: the backbones that it was trained with, where they do not
    follow from it. to: an adapter of those, a whole model, or (auto) an adapter unless the file holds other weights of
    the backbones than theirs. start: the checkpoint that it builds on, for one that holds LoRA alone. lora_alpha: of that
    LoRA, where the file does not tell.

    Raises UserError, with nothing written, for a format that is not known, for tensors that have no place or another
    shape, and for an adapter that would lose what the file holds.
    """
    out, path = Path(out), fetch_model(source)
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is overwritten; choose another folder")
    checkpoint = read_checkpoint(path)
    bridge = checkpoint if start is None else read_checkpoint(fetch_model(start))
    if not bridge.bridge:
        raise UserError(f"{source}: {checkpoint.format} checkpoint of LoRA alone; name the one that it builds on with --start")
    shape = geometry(bridge.bridge, bridge.where)
    model, processor = _build(checkpoint, shape, backbones_for(str(source), bridge, shape, wanted))
    lines = _fill(model, checkpoint, start)
    changed = _changed(model, checkpoint)
    if to == "adapter" and changed:
        raise UserError(
            f"{source}: holds {len(changed)} tensors of the backbones that are not theirs ({some(changed)}), which an "
            "adapter cannot keep; write a whole model (--to model)"
        )
    model.config.converted_from = checkpoint.format
    replace_tensors(model, {name: checkpoint.tensors()[name] for name in changed})
    if checkpoint.lora:
        add_updates(model, checkpoint.lora, checkpoint.lora_alpha if lora_alpha is None else lora_alpha, checkpoint.where)
    is_whole = to == "model" or bool(changed)
    with folder_in_place(out) as folder:
        if is_whole:
            save_whole(model, processor, folder, checkpoint, bool(changed))
        else:
            save_adapter(model, processor, folder)
    lines += [f"{len(changed)} tensors of the backbones are the checkpoint's own ({some(changed)})"] if changed else []
    return Conversion(_called(checkpoint), "model" if is_whole else "adapter", out, about(checkpoint) + lines)


def _called(checkpoint: Checkpoint) -> str:
    return " ".join([f"{checkpoint.format} checkpoint", *(f"({mark})" for mark in checkpoint.wrapped)])


def _build(
    checkpoint: Checkpoint, shape: Geometry, wanted: Backbones
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The backbones, unquantized and on the CPU, with a bridge of the checkpoint's shape."""
    vision = load_vision(wanted.vision, wanted.pretrained)
    if vision.width != shape.vis_dim:
        raise UserError(
            f"{checkpoint.where}: was trained on tower tokens of width {shape.vis_dim}, {wanted.vision} has {vision.width}; "
            "name its tower with --vision and --pretrained"
        )
    return build_flamingo(
        vision,
        load_language(wanted.language, dtype="auto"),
        cross_attn_every_n_layers=shape.every,
        media_visibility=checkpoint.visibility,
        perceiver=shape.perceiver,
        cross_attention=shape.cross_attention,
        extra_tokens=_extra_tokens(checkpoint),
    )


def _extra_tokens(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Otter's own token, unless a tokenizer beside its weights does without."""
    if checkpoint.format != OTTER:
        return ()
    told = [file.read_text(encoding="utf-8") for file in checkpoint.where.glob("*token*.json")]
    return () if told and not any(ANSWER_TOKEN in text for text in told) else (ANSWER_TOKEN,)


def _fill(model: FlamingoForConditionalGeneration, checkpoint: Checkpoint, start: str | Path | None) -> list[str]:
    """Put the bridge in place, in the number formats it is kept in; what it builds on first. Returns what to tell."""
    check_belongs(model, checkpoint)
    if start is not None:
        start_bridge(model, start)
        model.config.adapter_parts = _parts(checkpoint)
    _check_whole(model, checkpoint, start is not None)
    put_bridge(model, checkpoint.bridge)
    if start is not None:
        return [f"it builds on {start}, which the adapter records"]
    without = take_rows(model, checkpoint.language, checkpoint.where)
    return [f"rows of the new tokens are not in the file for {some(without)}: they are the language model's"] if without else []


def _parts(checkpoint: Checkpoint) -> list[str]:
    """The parts of the bridge that a checkpoint on top of another holds whole."""
    prefixes = {"perceiver": "perceiver.", "cross_attention": "gated_cross_attn_layers."}
    return [part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in checkpoint.bridge)]


def _check_whole(model: FlamingoForConditionalGeneration, checkpoint: Checkpoint, has_start: bool) -> None:
    """Refuse what lacks a weight of the bridge, unless it builds on another checkpoint."""
    prefixes = ("perceiver.", "gated_cross_attn_layers.")
    wanted = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    lacking, unknown = sorted(wanted - checkpoint.bridge.keys()), sorted(checkpoint.bridge.keys() - wanted)
    if unknown or (lacking and not has_start):
        what = f"lacks {len(lacking)} weights of the bridge ({some(lacking)})" if lacking else f"has unknown {some(unknown)}"
        raise UserError(f"{checkpoint.where}: {what}; give the whole checkpoint")


def _changed(model: FlamingoForConditionalGeneration, checkpoint: Checkpoint) -> list[str]:
    """Names of tensors of the backbones that are not what the checkpoint holds; the rows of new tokens are not theirs.

    Raises UserError for a tensor that the backbones have no place for.
    """
    own, changed = model.state_dict(), []
    for name, tensor in (checkpoint.language | checkpoint.vision).items():
        target = own.get(name)
        if target is None and _MADE_ANEW.fullmatch(name):
            checkpoint.left_out[name] = "today's language model makes itself"
        elif target is None or not _has_room(model, name, target, tensor):
            found = f"{name} {tuple(tensor.shape)}" + ("" if target is None else f", wanted {tuple(target.shape)}")
            raise UserError(f"{checkpoint.where}: no place for {found}; name the backbones that it was trained with")
        elif not _is_same(model, name, target, tensor):
            changed.append(name)
    return changed


def _has_room(model: FlamingoForConditionalGeneration, name: str, target: Tensor, tensor: Tensor) -> bool:
    """The same shape; a matrix of the vocabulary may have fewer rows, as OpenFlamingo cuts padding rows off."""
    if name in vocabulary_names(model) and len(tensor) < len(target):
        return tensor.shape[1:] == target.shape[1:]
    return tensor.shape == target.shape


def _is_same(model: FlamingoForConditionalGeneration, name: str, target: Tensor, tensor: Tensor) -> bool:
    """Whether the backbone's tensor, in the checkpoint's number format, is the checkpoint's."""
    if name not in vocabulary_names(model) or model.token_rows is None:
        return target.to(tensor.dtype).equal(tensor)
    others = torch.ones(len(tensor), dtype=torch.bool)
    others[[token for token in model.token_rows.token_ids if token < len(tensor)]] = False
    return target[: len(tensor)][others].to(tensor.dtype).equal(tensor[others])
