"""Import a foreign checkpoint as an adapter, or as a whole model if it changed the backbones themselves."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flamingo_ft.adapters import save_adapter, write_card
from flamingo_ft.adapters.answering import use_greedy_decoding
from flamingo_ft.adapters.merge import LARGEST_SHARD, fold_lora, make_standalone
from flamingo_ft.adapters.save import save_processor
from flamingo_ft.atomic import folder_in_place
from flamingo_ft.backbones.attention import restore_fused_attention
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint, read_checkpoint
from flamingo_ft.formats.stored_files import first_few
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .load_into_model import add_checkpoint_lora, changed_backbone_tensors, load_bridge, replace_tensors
from .matching_model import Backbones, build_matching_model

Target = Literal["auto", "adapter", "model"]


@dataclass
class Conversion:
    """Summary of a conversion.

    source: the format that was recognized. result: what was written. out: where. lines: further notes for the
        user.
    """

    source: str
    result: str
    out: Path
    lines: list[str] = field(default_factory=list)


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
    model, processor, notes = build_matching_model(str(source), checkpoint, base, backbones)
    notes += load_bridge(model, checkpoint, start)
    changed = changed_backbone_tensors(model, checkpoint)
    if to == "adapter" and changed:
        raise UserError(
            f"{source}: holds {len(changed)} tensors of the backbones that are not theirs "
            f"({first_few(changed)}), which an adapter cannot store; write a whole model (--to model)"
        )
    model.config.converted_from = checkpoint.format
    _load_backbones_and_lora(model, checkpoint, changed, lora_alpha)
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
    return Conversion(kind, result, out, _describe_checkpoint(checkpoint) + notes)


def _load_backbones_and_lora(
    model: FlamingoForConditionalGeneration,
    checkpoint: ForeignCheckpoint,
    changed: Sequence[str],
    lora_alpha: float | None,
) -> None:
    """Load what a checkpoint holds besides the bridge: the ``changed`` tensors of the backbones, and LoRA."""
    tensors = checkpoint.tensors()
    replace_tensors(model, {name: tensors[name] for name in changed})
    if checkpoint.lora:
        alpha = checkpoint.lora_alpha if lora_alpha is None else lora_alpha
        add_checkpoint_lora(model, checkpoint.lora, alpha, checkpoint.path)


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
    restore_fused_attention(model.vision_encoder)
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


# --- The summary


def _describe_checkpoint(checkpoint: ForeignCheckpoint) -> list[str]:
    """Return one line for each part of a checkpoint, and one for each reason to skip tensors."""
    perceiver = {name: t for name, t in checkpoint.bridge.items() if name.startswith("perceiver.")}
    parts = {
        "perceiver": perceiver,
        "cross-attention": {name: t for name, t in checkpoint.bridge.items() if name not in perceiver},
        "language model": checkpoint.language,
        "vision tower": checkpoint.vision,
        "LoRA": checkpoint.lora,
    }
    lines = [f"{name}: {_describe_tensors(tensors)}" for name, tensors in parts.items() if tensors]
    reasons = Counter(checkpoint.skipped.values())
    return lines + [f"skipped: {count} tensors ({reason})" for reason, count in reasons.items()]


def _describe_tensors(tensors: Mapping[str, Tensor]) -> str:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    values = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {values:,} values in {' and '.join(dtypes)}"


def _dtype_notes(model: FlamingoForConditionalGeneration) -> list[str]:
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(dtypes) == 1:
        return []
    return [
        f"its weights are in {' and '.join(dtypes)}, and load in the widest of these unless dtype is given"
    ]
