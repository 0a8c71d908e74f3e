"""A foreign checkpoint and its backbones -> an adapter, or a whole model where the backbones themselves were changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.init_from import copy_bridge, init_bridge
from flamingo_ft.atomic import folder_in_place
from flamingo_ft.backbones.decoder_layers import hidden_size
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import VisionBackbone, load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.formats import Checkpoint, clip, read_checkpoint
from flamingo_ft.formats.geometry import Geometry, geometry
from flamingo_ft.formats.otter import ANSWER_TOKEN
from flamingo_ft.formats.recognise import MADE_ANEW, OTTER
from flamingo_ft.formats.stored import some
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.checkpoints import check_belongs
from flamingo_ft.model.tokens import add_media_tokens

from .known import Backbones, backbones_for
from .report import Conversion, about
from .updates import add_updates
from .vocabulary import take_rows, vocabulary_names
from .whole import replace_tensors, save_whole

Target = Literal["auto", "adapter", "model"]


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    wanted: Backbones = Backbones(),  # noqa: B008 (immutable)
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
        raise UserError(
            f"{source}: {checkpoint.format} checkpoint of LoRA alone; name the one that it builds on with --start"
        )
    shape = geometry(bridge.bridge, bridge.where)
    known = backbones_for(str(source), bridge, shape, wanted)
    model, processor, lines = _build(checkpoint, bridge.visibility, shape, known)
    lines += _fill(model, checkpoint, start)
    changed = _changed(model, checkpoint)
    if to == "adapter" and changed:
        raise UserError(
            f"{source}: holds {len(changed)} tensors of the backbones that are not theirs ({some(changed)}), which an "
            "adapter cannot keep; write a whole model (--to model)"
        )
    model.config.converted_from = checkpoint.format
    replace_tensors(model, {name: checkpoint.tensors()[name] for name in changed})
    if checkpoint.lora:
        add_updates(
            model,
            checkpoint.lora,
            checkpoint.lora_alpha if lora_alpha is None else lora_alpha,
            checkpoint.where,
        )
    is_whole = to == "model" or bool(changed)
    with folder_in_place(out) as folder:
        if is_whole:
            save_whole(model, processor, folder, checkpoint, bool(changed))
        else:
            save_adapter(model, processor, folder)
    formats = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if is_whole and len(formats) > 1:
        lines.append(
            f"its weights are in {' and '.join(sorted(formats))}, and are loaded in the widest unless dtype says another"
        )
    lines += (
        [f"{len(changed)} tensors of the backbones are the checkpoint's own ({some(changed)})"]
        if changed
        else []
    )
    return Conversion(_called(checkpoint), "model" if is_whole else "adapter", out, about(checkpoint) + lines)


def _called(checkpoint: Checkpoint) -> str:
    return " ".join([f"{checkpoint.format} checkpoint", *(f"({mark})" for mark in checkpoint.wrapped)])


def _build(
    checkpoint: Checkpoint, visibility: str, shape: Geometry, known: Backbones
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor, list[str]]:
    """The backbones, unquantized and on the CPU, with a bridge of the checkpoint's shape; and what to tell of it."""
    vision, language = (
        load_vision(known.vision, known.pretrained),
        load_language(known.language, dtype="auto"),
    )
    _check_backbones(checkpoint, shape, known, vision, language)
    extra, lines = _extra_tokens(checkpoint, language)
    model, processor = build_flamingo(
        vision,
        language,
        cross_attn_every_n_layers=shape.every,
        media_visibility=visibility,
        perceiver=shape.perceiver,
        cross_attention=shape.cross_attention,
        extra_tokens=extra,
    )
    tower = " ".join(filter(None, [known.vision, known.pretrained]))
    return model, processor, [f"around language model {known.language} and tower {tower}", *lines]


def _check_backbones(
    checkpoint: Checkpoint,
    shape: Geometry,
    known: Backbones,
    vision: VisionBackbone,
    language: LanguageBackbone,
) -> None:
    """Refuse backbones whose widths or activation are not those of the checkpoint."""
    where, width = checkpoint.where, hidden_size(language.model.config)
    if vision.width != shape.vis_dim:
        raise UserError(
            f"{where}: was trained on tower tokens of width {shape.vis_dim}, {known.vision} has {vision.width}; "
            "name its tower with --vision and --pretrained"
        )
    if width != shape.width:
        raise UserError(
            f"{where}: was trained with a language model of width {shape.width}, {known.language} has {width}; name it with "
            "--language"
        )
    activation = (checkpoint.config.get("vision_config") or {}).get("hidden_act")
    if activation is not None and ("quick" in activation) != vision.config["quick_gelu"]:
        raise UserError(
            f"{where}: its tower computes with {activation}, {known.vision} with another; name it with --vision"
        )


def _extra_tokens(checkpoint: Checkpoint, language: LanguageBackbone) -> tuple[tuple[str, ...], list[str]]:
    """Otter's own token, unless a tokenizer beside its weights does without or its vocabulary has no row for it."""
    if checkpoint.format != OTTER:
        return (), []
    told = [file.read_text(encoding="utf-8") for file in checkpoint.where.glob("*token*.json")]
    if told:
        return ((ANSWER_TOKEN,) if any(ANSWER_TOKEN in text for text in told) else ()), []
    tokenizer = copy.deepcopy(language.tokenizer)
    add_media_tokens(tokenizer, (ANSWER_TOKEN,))
    embedding = language.model.get_input_embeddings().weight
    name = next(name for name, parameter in language.model.named_parameters() if parameter is embedding)
    if len(checkpoint.language.get(f"lang_encoder.{name}", tokenizer)) < len(tokenizer):
        return (), [f"its vocabulary has no row for {ANSWER_TOKEN}, which is left out"]
    return (ANSWER_TOKEN,), [f"{ANSWER_TOKEN} is taken to be among its tokens, as with all of Otter"]


def _fill(
    model: FlamingoForConditionalGeneration, checkpoint: Checkpoint, start: str | Path | None
) -> list[str]:
    """Put the bridge in place, in the number formats it is kept in; what it builds on first. Returns what to tell."""
    check_belongs(model, checkpoint)
    if start is not None:
        init_bridge(model, start)
        model.config.adapter_parts = _parts(model, checkpoint)
    elif model.token_rows is not None:
        model.token_rows.copy_from(model.lang_encoder)
    _check_whole(model, checkpoint, start is not None)
    copy_bridge(model, checkpoint.bridge)
    without = take_rows(model, checkpoint.language, checkpoint.where)
    if start is not None:
        return [f"it builds on {start}"]
    return (
        [f"rows of the new tokens are not in the file for {some(without)}: they are the language model's"]
        if without
        else []
    )


def _parts(model: FlamingoForConditionalGeneration, checkpoint: Checkpoint) -> list[str]:
    """The parts of the bridge that a checkpoint on top of another holds whole."""
    prefixes = {"perceiver": "perceiver.", "cross_attention": "gated_cross_attn_layers."}
    parts = [
        part
        for part, prefix in prefixes.items()
        if any(name.startswith(prefix) for name in checkpoint.bridge)
    ]
    return parts + ["new_tokens"] * bool(vocabulary_names(model).keys() & checkpoint.language.keys())


def _check_whole(model: FlamingoForConditionalGeneration, checkpoint: Checkpoint, has_start: bool) -> None:
    """Refuse what lacks a weight of the bridge, unless it builds on another checkpoint."""
    prefixes = ("perceiver.", "gated_cross_attn_layers.")
    wanted = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    lacking, unknown = sorted(wanted - checkpoint.bridge.keys()), sorted(checkpoint.bridge.keys() - wanted)
    if unknown or (lacking and not has_start):
        what = (
            f"lacks {len(lacking)} weights of the bridge ({some(lacking)})"
            if lacking
            else f"has unknown {some(unknown)}"
        )
        raise UserError(f"{checkpoint.where}: {what}; give the whole checkpoint")


def _changed(model: FlamingoForConditionalGeneration, checkpoint: Checkpoint) -> list[str]:
    """Names of tensors of the backbones that are not what the checkpoint holds; the rows of new tokens are not theirs.

    Raises UserError for a tensor that the backbones have no place for.
    """
    own, changed = model.state_dict(), []
    tower = {name for name in own if name.startswith(clip.HERE)} - {clip.HERE + clip.NOT_USED}
    if checkpoint.vision and (lacking := sorted(tower - checkpoint.vision.keys())):
        raise UserError(
            f"{checkpoint.where}: its tower lacks {len(lacking)} tensors ({some(lacking)}); give the whole checkpoint"
        )
    for name, tensor in (checkpoint.language | checkpoint.vision).items():
        target = own.get(name)
        if target is None and MADE_ANEW.fullmatch(name):
            checkpoint.left_out[name] = "today's language model makes itself"
        elif target is None or not _has_room(model, name, target, tensor):
            found = f"{name} {tuple(tensor.shape)}" + (
                "" if target is None else f", wanted {tuple(target.shape)}"
            )
            raise UserError(
                f"{checkpoint.where}: no place for {found}; name the backbones that it was trained with"
            )
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
