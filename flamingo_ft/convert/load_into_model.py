"""Load the parts of a foreign checkpoint into a model: the bridge, LoRA, and weights of the backbones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_ft.adapters.init_from import copy_bridge, init_bridge
from flamingo_ft.adapters.load import load_lora_weights
from flamingo_ft.adapters.lora import inject, linear_layers, lora_config
from flamingo_ft.config import LoraPart, LoraSection
from flamingo_ft.config.tables import NEW_TOKENS
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint
from flamingo_ft.formats.foreign_checkpoint import BRIDGE_PREFIXES, RECOMPUTED_BUFFERS
from flamingo_ft.formats.key_names import UNUSED_PROJECTION, VISION_PREFIX
from flamingo_ft.formats.stored_files import first_few
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.open_flamingo_checkpoints import check_fits_model
from flamingo_ft.model.parts import BRIDGE, PARTS, part_of

LANGUAGE_PREFIX = "lang_encoder."
_A, _B = ".lora_A.weight", ".lora_B.weight"


# --- The bridge


def load_bridge(
    model: FlamingoForConditionalGeneration, checkpoint: ForeignCheckpoint, start: str | Path | None
) -> list[str]:
    """Load the bridge in its own dtypes, on top of that of ``start`` if given. Return notes for the user.

    Raises UserError for a bridge of another model, and for one that is incomplete without ``start``.
    """
    check_fits_model(model, checkpoint)
    if start is not None:
        init_bridge(model, start)
        model.config.adapter_parts = _parts_held(model, checkpoint)
    elif model.token_rows is not None:
        model.token_rows.copy_from(model.lang_encoder)
    _check_complete_bridge(model, checkpoint, has_start=start is not None)
    copy_bridge(model, checkpoint.bridge)
    missing = load_token_rows(model, checkpoint.language, checkpoint.path)
    if start is not None:
        return [f"it builds on {start}"]
    if missing:
        return [
            f"no rows of the new tokens in the file for {first_few(missing)}: the language model's are used"
        ]
    return []


def _parts_held(model: FlamingoForConditionalGeneration, checkpoint: ForeignCheckpoint) -> list[str]:
    """Return the parts of the bridge that a checkpoint on top of another holds in full."""
    held = {part_of(name).name for name in checkpoint.bridge}
    if vocabulary_matrices(model).keys() & checkpoint.language.keys():
        held.add(NEW_TOKENS.name)  # foreign checkpoints keep their rows in the language model's matrices
    return [part for part in BRIDGE if part in held]


def _check_complete_bridge(
    model: FlamingoForConditionalGeneration, checkpoint: ForeignCheckpoint, has_start: bool
) -> None:
    expected = {name for name, _ in model.named_parameters() if name.startswith(BRIDGE_PREFIXES)}
    missing, unknown = (
        sorted(expected - checkpoint.bridge.keys()),
        sorted(checkpoint.bridge.keys() - expected),
    )
    if missing and not has_start:
        problem = f"lacks {len(missing)} weights of the bridge ({first_few(missing)})"
        raise UserError(f"{checkpoint.path}: {problem}; give the whole checkpoint")
    if unknown:
        raise UserError(
            f"{checkpoint.path}: unknown weights of the bridge ({first_few(unknown)}); give a checkpoint of "
            "OpenFlamingo, Otter or Multimodal-GPT"
        )


# --- Vocabulary matrices: foreign checkpoints store them in full, a Flamingo only the rows of its new tokens


def vocabulary_matrices(model: FlamingoForConditionalGeneration) -> dict[str, nn.Embedding | None]:
    """Return the names of the input embedding and the output head, in this order, each with its token rows.

    The token rows stand in for the matrix's own rows of new tokens; a head tied to the embedding shares its.
    """
    lm: Any = model.lang_encoder
    rows = model.token_rows
    names = {module: f"{LANGUAGE_PREFIX}{name}.weight" for name, module in lm.named_modules()}
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    matrices: dict[str, nn.Embedding | None] = {names[embedding]: None if rows is None else rows.input}
    if head is not None:
        matrices[names[head]] = None if rows is None else rows.output or rows.input
    return matrices


def load_token_rows(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], path: object
) -> list[str]:
    """Load the model's token rows from the checkpoint's matrices. Return the names of matrices that it lacks.

    Raises UserError for a vocabulary that ends before the new tokens, and for tied matrices with different
    values.
    """
    if model.token_rows is None:
        return []
    token_ids, matrices = list(model.token_rows.token_ids), vocabulary_matrices(model)
    loaded_from: dict[nn.Embedding, str] = {}  # token rows: the first matrix that they were loaded from
    for name, rows in matrices.items():
        matrix = tensors.get(name)
        if matrix is None or rows is None:
            continue
        if len(matrix) <= max(token_ids):
            raise UserError(
                f"{path}: its vocabulary ends at {len(matrix)} ({name}), but the new tokens of this language "
                f"model reach {max(token_ids)}; name the language model that it was trained with (--language)"
            )
        first = loaded_from.setdefault(rows, name)
        if not matrix.equal(tensors[first]):
            raise UserError(
                f"{path}: {' and '.join(matrices)} are tied in this language model, but differ in the "
                "checkpoint; name the language model that it was trained with (--language)"
            )
        rows.weight.data = matrix[token_ids].clone()
    return [name for name, rows in matrices.items() if rows not in loaded_from]


# --- Weights of the backbones


def changed_backbone_tensors(
    model: FlamingoForConditionalGeneration, checkpoint: ForeignCheckpoint
) -> list[str]:
    """Return the names of backbone tensors whose values in the checkpoint are not the model's.

    The rows of new tokens are ignored: they belong to the bridge. Raises UserError for a tensor that the
    backbones do not have, and for an incomplete tower.
    """
    own, changed = model.state_dict(), []
    _check_complete_tower(own, checkpoint)
    for name, tensor in (checkpoint.language | checkpoint.vision).items():
        target = own.get(name)
        if target is None and RECOMPUTED_BUFFERS.fullmatch(name):
            checkpoint.skipped[name] = "the language model computes them when it is built"
        elif target is None or not _fits(model, name, target, tensor):
            expected = "" if target is None else f", expected {tuple(target.shape)}"
            raise UserError(
                f"{checkpoint.path}: no place for {name} {tuple(tensor.shape)}{expected}; name the backbones "
                "that the checkpoint was trained with"
            )
        elif not _is_equal(model, name, target, tensor):
            changed.append(name)
    return changed


def _check_complete_tower(own: Iterable[str], checkpoint: ForeignCheckpoint) -> None:
    tower = {name for name in own if name.startswith(VISION_PREFIX)} - {VISION_PREFIX + UNUSED_PROJECTION}
    missing = sorted(tower - checkpoint.vision.keys())
    if checkpoint.vision and missing:
        raise UserError(
            f"{checkpoint.path}: its tower lacks {len(missing)} tensors ({first_few(missing)}); "
            "give the whole checkpoint"
        )


def _fits(model: FlamingoForConditionalGeneration, name: str, target: Tensor, tensor: Tensor) -> bool:
    """Return whether shapes agree. Vocabulary matrices may be shorter: OpenFlamingo cuts padding rows off."""
    if name in vocabulary_matrices(model) and len(tensor) < len(target):
        return tensor.shape[1:] == target.shape[1:]
    return tensor.shape == target.shape


def _is_equal(model: FlamingoForConditionalGeneration, name: str, target: Tensor, tensor: Tensor) -> bool:
    """Return whether the model's tensor, in the checkpoint's dtype, is the checkpoint's, new tokens aside."""
    if name not in vocabulary_matrices(model) or model.token_rows is None:
        return target.to(tensor.dtype).equal(tensor)
    is_old_token = torch.ones(len(tensor), dtype=torch.bool)
    is_old_token[[token for token in model.token_rows.token_ids if token < len(tensor)]] = False
    return target[: len(tensor)][is_old_token].to(tensor.dtype).equal(tensor[is_old_token])


@torch.no_grad()
def replace_tensors(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of the model by ``tensors``, which may be memory-mapped and are not copied.

    Of a vocabulary matrix with fewer rows than the model's, those rows are replaced.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        own = parameters[name]
        if own.shape == tensor.shape:
            own.data = tensor
            continue
        padded = own.data.to(tensor.dtype, copy=True)
        padded[: len(tensor)] = tensor
        own.data = padded


# --- LoRA


def add_checkpoint_lora(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], alpha: float | None, path: Path
) -> None:
    """Add LoRA with the checkpoint's weights to the model.

    Raises UserError for LoRA that the model has no matrix for, for ranks that differ within a part, for
    anything but pairs of lora_A and lora_B, and for an unknown alpha.
    """
    if alpha is None:
        raise UserError(
            f"{path}: the checkpoint does not record lora_alpha; "
            "give the value it was trained with (--lora-alpha)"
        )
    if alpha < 1 or alpha != int(alpha):
        raise UserError(
            f"{path}: lora_alpha must be a positive whole number, got {alpha}; this LoRA cannot be imported"
        )
    targets: dict[str, Sequence[str]] = {}
    for part in PARTS.values():
        lora_a = [name for name in tensors if name.startswith(part.prefix) and name.endswith(_A)]
        if lora_a:
            targets[part.name] = [name.removesuffix(_A) for name in lora_a]
    _check_targets_exist(model, targets, path)
    all_layers = [layer for layers in targets.values() for layer in layers]
    _check_complete_pairs(tensors, all_layers, path)
    _check_lora_shapes(model, tensors, all_layers, path)
    parts: dict[str, Any] = {
        part: LoraPart(r=_rank(tensors, layers, path), lora_alpha=int(alpha))
        for part, layers in targets.items()
    }
    inject(model, lora_config(model, LoraSection(**parts), targets))
    load_lora_weights(model, tensors)


def _check_targets_exist(
    model: FlamingoForConditionalGeneration, targets: Mapping[str, Sequence[str]], path: Path
) -> None:
    unknown: list[str] = []
    for part, layers in targets.items():
        own = set(linear_layers(model, part))
        unknown += [layer for layer in layers if layer not in own]
    if unknown:
        raise UserError(
            f"{path}: has LoRA for {first_few(unknown)}, which this language model does not have; "
            "name the one that the checkpoint was trained with (--language)"
        )


def _check_complete_pairs(tensors: Mapping[str, Tensor], layers: list[str], path: Path) -> None:
    expected = {layer + suffix for layer in layers for suffix in (_A, _B)}
    unpaired = sorted(expected ^ tensors.keys())
    if unpaired:
        raise UserError(
            f"{path}: LoRA must be pairs of lora_A and lora_B, got missing or other weights: "
            f"{first_few(unpaired)}; this LoRA cannot be imported"
        )


def _check_lora_shapes(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], layers: list[str], path: Path
) -> None:
    """Refuse LoRA whose matrices do not fit the layers' (out, in), or (in, out) as in GPT-2."""
    for layer in layers:
        matrix: Any = model.get_submodule(layer).weight
        rows, columns = matrix.shape
        lora_a, lora_b = tensors[layer + _A], tensors[layer + _B]
        if (lora_a.shape[1], len(lora_b)) not in ((columns, rows), (rows, columns)):
            raise UserError(
                f"{path}: LoRA of {layer} does not fit its matrix of {(rows, columns)}, got lora_B "
                f"{tuple(lora_b.shape)} and lora_A {tuple(lora_a.shape)}; "
                "name the language model of the checkpoint (--language)"
            )


def _rank(tensors: Mapping[str, Tensor], layers: Sequence[str], path: Path) -> int:
    ranks = {len(tensors[layer + _A]) for layer in layers}
    if len(ranks) > 1:
        raise UserError(
            f"{path}: LoRA of one part must have one rank, got ranks {sorted(ranks)}; "
            "this LoRA cannot be imported"
        )
    return ranks.pop()
