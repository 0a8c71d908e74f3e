"""What a conversion takes and returns: the backbones of a checkpoint, and a summary of what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flamingo_ft.adapters.released_models import RELEASED_MODELS, TOWER, ReleasedModel, find_released
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint
from flamingo_ft.formats.foreign_checkpoint import OPEN_FLAMINGO, OPEN_FLAMINGO_1, BridgeShape


@dataclass(frozen=True)
class Backbones:
    """Names of the backbones as in a recipe's model.language and model.vision; None for unknown ones."""

    language: str | None = None
    vision: str | None = None
    pretrained: str | None = None


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


@dataclass(frozen=True)
class KnownBackbones:
    """Names of both backbones."""

    language: str
    vision: str
    pretrained: str | None = None


def resolve_backbones(
    source: str, checkpoint: ForeignCheckpoint, shape: BridgeShape, requested: Backbones
) -> KnownBackbones:
    """Complete ``requested`` with the backbones that the checkpoint was trained with.

    The language model follows from the name of a released model or, for OpenFlamingo's, from the shape of the
    bridge. The tower is OpenAI's ViT-L-14, as in all released Flamingos, unless one is requested.

    Raises UserError if the language model is neither requested nor clear.
    """
    if requested.pretrained is not None and requested.vision is None:
        raise UserError(
            f"--pretrained: needs --vision, got only {requested.pretrained}; "
            "name the architecture that it is a tag of"
        )
    language = requested.language
    if language is None:
        language = _find_language(source, checkpoint, shape)
    if requested.vision is None:
        return KnownBackbones(language, *TOWER)
    return KnownBackbones(language, requested.vision, requested.pretrained)


def _find_language(source: str, checkpoint: ForeignCheckpoint, shape: BridgeShape) -> str:
    """Return the name of the checkpoint's language model, or raise UserError with the ones that it may be."""
    recorded = (checkpoint.config.get("text_config") or {}).get("_name_or_path")
    by_name = find_released(source)
    if by_name:
        candidates = [by_name]
    elif checkpoint.format in (OPEN_FLAMINGO, OPEN_FLAMINGO_1):
        candidates = [model for model in RELEASED_MODELS if _has_shape(model, checkpoint, shape)]
    else:
        candidates = []
    if len(candidates) == 1 and not recorded:
        return candidates[0].languages[0]
    names = [recorded] if recorded else [model.languages[0] for model in candidates]
    hint = f" (it may be {' or '.join(names)})" if names else ""
    raise UserError(
        f"{source}: cannot tell the checkpoint's language model for certain{hint}; name it with --language"
    )


def _has_shape(model: ReleasedModel, checkpoint: ForeignCheckpoint, shape: BridgeShape) -> bool:
    same_layers = checkpoint.decoder_layers in (None, model.layers_path)
    return same_layers and (shape.blocks, shape.lm_width) == (model.blocks, model.width)


def describe_checkpoint(checkpoint: ForeignCheckpoint) -> list[str]:
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
