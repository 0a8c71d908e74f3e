"""Import a foreign checkpoint as an adapter, or as a whole model if it changed the backbones themselves."""

from __future__ import annotations

import copy
import warnings
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch

from flamingo_ft.adapters import save_adapter, write_card
from flamingo_ft.adapters.answering import use_greedy_decoding
from flamingo_ft.adapters.merge import LARGEST_SHARD, fold_lora, make_standalone
from flamingo_ft.adapters.save import save_processor
from flamingo_ft.atomic import folder_in_place
from flamingo_ft.backbones.attention import refuse_attention
from flamingo_ft.backbones.decoder_layers import hidden_size
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.vision import VisionBackbone, load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint, read_checkpoint
from flamingo_ft.formats.foreign_checkpoint import OTTER, BridgeShape, Visibility, bridge_shape
from flamingo_ft.formats.key_names import ANSWER_TOKEN
from flamingo_ft.formats.stored_files import first_few
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.added_tokens import add_media_tokens

from .conversion import Backbones, Conversion, KnownBackbones, describe_checkpoint, resolve_backbones
from .load_into_model import add_checkpoint_lora, changed_backbone_tensors, load_bridge, replace_tensors

Target = Literal["auto", "adapter", "model"]


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    backbones: Backbones = Backbones(),  # noqa: B008 (immutable)
    *,
    to: Target = "auto",
    start: str | Path | None = None,
    lora_alpha: float | None = None,
    wanted: Backbones | None = None,
) -> Conversion:
    """Import a checkpoint of OpenFlamingo, Otter or Multimodal-GPT into the folder ``out``.

    source: a file, a folder, or a name on the Hub.
    backbones: the backbones that it was trained with, if they do not follow from it.
    to: write an adapter of those backbones, or a whole model; "auto" writes an adapter unless the checkpoint
        holds other weights of the backbones than theirs.
    start: the checkpoint that ``source`` builds on, if that is LoRA only.
    lora_alpha: of that LoRA, if the checkpoint does not record it.
    wanted: deprecated name of ``backbones``.

    Raises UserError, with nothing written, for an unknown format, for tensors that the model has no place for
    or that have another shape, and for an adapter that would lose weights of the checkpoint.
    """
    if wanted is not None:
        warnings.warn("import_checkpoint: wanted is now called backbones", FutureWarning, stacklevel=2)
        backbones = wanted
    out, path = Path(out), fetch_model(source)
    if out.exists():
        raise UserError(f"{out}: already exists and is not overwritten; choose another folder")
    checkpoint = read_checkpoint(path)
    base = checkpoint if start is None else read_checkpoint(fetch_model(start))
    if not base.bridge:
        raise UserError(
            f"{source}: {checkpoint.format} checkpoint of LoRA alone; "
            "name the checkpoint that it builds on (--start)"
        )
    shape = bridge_shape(base.bridge, base.path)
    known = resolve_backbones(str(source), base, shape, backbones)
    model, processor, notes = _build_model(checkpoint, base.visibility, shape, known)
    notes += load_bridge(model, checkpoint, start)
    changed = changed_backbone_tensors(model, checkpoint)
    if to == "adapter" and changed:
        raise UserError(
            f"{source}: holds {len(changed)} tensors of the backbones that are not theirs "
            f"({first_few(changed)}), which an adapter cannot store; write a whole model (--to model)"
        )
    model.config.converted_from = checkpoint.format
    tensors = checkpoint.tensors()
    replace_tensors(model, {name: tensors[name] for name in changed})
    if checkpoint.lora:
        alpha = checkpoint.lora_alpha if lora_alpha is None else lora_alpha
        add_checkpoint_lora(model, checkpoint.lora, alpha, checkpoint.path)
    result = "model" if to == "model" or changed else "adapter"
    with folder_in_place(out) as folder:
        if result == "model":
            _save_model(model, processor, folder, checkpoint, own_backbones=bool(changed))
            notes += _dtype_notes(model)
        else:
            save_adapter(model, processor, folder)
    if changed:
        notes.append(
            f"{len(changed)} tensors of the backbones are the checkpoint's own ({first_few(changed)})"
        )
    kind = " ".join([f"{checkpoint.format} checkpoint", *(f"({mark})" for mark in checkpoint.wrapping)])
    return Conversion(kind, result, out, describe_checkpoint(checkpoint) + notes)


def _dtype_notes(model: FlamingoForConditionalGeneration) -> list[str]:
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(dtypes) == 1:
        return []
    return [
        f"its weights are in {' and '.join(dtypes)}, and load in the widest of these unless dtype is given"
    ]


# --- The model to load the checkpoint into


def _build_model(
    checkpoint: ForeignCheckpoint, visibility: Visibility, shape: BridgeShape, backbones: KnownBackbones
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor, list[str]]:
    """Build the model on the CPU, with unquantized backbones. Also return notes for the user."""
    vision = load_vision(backbones.vision, backbones.pretrained)
    language = load_language(backbones.language, dtype="auto")
    _check_backbones(checkpoint, shape, backbones, vision, language)
    extra_tokens, notes = _extra_tokens(checkpoint, language)
    model, processor = build_flamingo(
        vision,
        language,
        cross_attn_every_n_layers=shape.cross_attn_every_n_layers,
        media_visibility=visibility,
        perceiver=shape.perceiver,
        cross_attention=shape.cross_attention,
        extra_tokens=extra_tokens,
    )
    tower = " ".join(filter(None, [backbones.vision, backbones.pretrained]))
    return model, processor, [f"backbones: language model {backbones.language}, tower {tower}", *notes]


def _check_backbones(
    checkpoint: ForeignCheckpoint,
    shape: BridgeShape,
    backbones: KnownBackbones,
    vision: VisionBackbone,
    language: LanguageBackbone,
) -> None:
    """Refuse backbones whose width or activation is not the checkpoint's."""
    path, width = checkpoint.path, hidden_size(language.model.config)
    if vision.width != shape.vis_dim:
        raise UserError(
            f"{path}: was trained on tower tokens of width {shape.vis_dim}, {backbones.vision} has "
            f"{vision.width}; name its tower with --vision and --pretrained"
        )
    if width != shape.lm_width:
        raise UserError(
            f"{path}: was trained with a language model of width {shape.lm_width}, {backbones.language} has "
            f"{width}; name its language model with --language"
        )
    activation = (checkpoint.config.get("vision_config") or {}).get("hidden_act")
    if activation is not None and ("quick" in activation) != vision.config["quick_gelu"]:
        raise UserError(
            f"{path}: its tower computes with {activation}, {backbones.vision} with another activation; "
            "name its tower with --vision"
        )


def _extra_tokens(
    checkpoint: ForeignCheckpoint, language: LanguageBackbone
) -> tuple[tuple[str, ...], list[str]]:
    """Return the tokens that Otter adds, and notes for the user.

    A tokenizer beside the weights decides; without one, the vocabulary must have a row for the token.
    """
    if checkpoint.format != OTTER:
        return (), []
    tokenizer_files = [file.read_text(encoding="utf-8") for file in checkpoint.path.glob("*token*.json")]
    if tokenizer_files:
        return ((ANSWER_TOKEN,) if any(ANSWER_TOKEN in text for text in tokenizer_files) else ()), []
    tokenizer = copy.deepcopy(language.tokenizer)
    add_media_tokens(tokenizer, (ANSWER_TOKEN,))
    embedding = language.model.get_input_embeddings().weight
    name = next(name for name, parameter in language.model.named_parameters() if parameter is embedding)
    stored = checkpoint.language.get(f"lang_encoder.{name}")
    if stored is not None and len(stored) < len(tokenizer):
        return (), [f"{ANSWER_TOKEN} is left out: the checkpoint's vocabulary has no row for it"]
    return (ANSWER_TOKEN,), [f"{ANSWER_TOKEN} is assumed to be one of its tokens, as in all of Otter"]


# --- Writing a whole model


def _save_model(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    folder: Path,
    checkpoint: ForeignCheckpoint,
    own_backbones: bool,
) -> None:
    """Save the whole model in its own dtypes, with LoRA folded into its matrices.

    own_backbones: whether weights of the backbones are the checkpoint's own.
    """
    lora_parts = fold_lora(model)
    refuse_attention(model.vision_encoder)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    origin = {
        "checkpoint_sha256": tensors_sha256(checkpoint.tensors()),
        "lora": lora_parts,
        "own_backbones": own_backbones,
    }
    use_greedy_decoding(model, processor)
    config: Any = model.config
    make_standalone(config, reduce(torch.promote_types, dtypes), origin)
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    save_processor(processor, folder)
    write_card(folder)
