"""Load OpenFlamingo and Otter checkpoints into either API of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_ft.backbones.quantization import quantization_formats
from flamingo_ft.config.tables import CROSS_ATTENTION, NEW_TOKENS
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint, parse_checkpoint, read_checkpoint
from flamingo_ft.formats.foreign_checkpoint import BRIDGE_PREFIXES, has_wrapped_layers
from flamingo_ft.formats.stored_files import first_few, unwrap_state_dict

from .core import FlamingoCore
from .parts import part_of
from .token_rows import input_embedding, output_head


@dataclass
class LoadReport:
    """The keys that a checkpoint and a model share and do not share, under the model's names.

    missing: of the backbones; a missing or mismatched weight of the bridge raises an error instead.
    copied_rows: rows of new tokens that the checkpoint lacks and that are the language model's, in its dtype.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    copied_rows: list[str] = field(default_factory=list)


def is_open_flamingo(state_dict: Mapping[str, Any]) -> bool:
    """Return whether the keys are OpenFlamingo's, bare or as its training script saves them."""
    content = state_dict.get("model_state_dict", state_dict)
    return has_wrapped_layers(str(key).removeprefix("module.") for key in content)


def load_open_flamingo(model: FlamingoCore, checkpoint: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load an OpenFlamingo or Otter checkpoint (a path, or its state dict) into ``model``, in place.

    The checkpoint must have every weight of the bridge, in the model's shapes. Weights of the backbones are
    loaded if it has them, as an Otter's folder does. Raises UserError, with nothing loaded, for a checkpoint
    of another language model or interval, and for one that lacks weights of the bridge.
    """
    if isinstance(checkpoint, Mapping):
        parsed = parse_checkpoint(unwrap_state_dict(checkpoint, Path("checkpoint")))
    else:
        parsed = read_checkpoint(Path(checkpoint))
    check_fits_model(model, parsed)
    if parsed.lora:
        raise UserError(
            f"{parsed.path}: has LoRA, which would be lost; import the checkpoint with flamingo-ft convert"
        )
    tensors = parsed.tensors()
    targets = {name: tensor for name, tensor in model.state_dict().items() if part_of(name) != NEW_TOKENS}
    report = _compare(tensors, targets, vocabulary=len(input_embedding(model.lang_encoder).weight))
    _check_bridge(report, bool(quantization_formats(model)))
    _check_vocabulary(model, tensors)
    with torch.no_grad():
        for name in report.loaded:
            targets[name][: len(tensors[name])].copy_(tensors[name])
    report.copied_rows = _load_token_rows(model, tensors)
    return report


def check_fits_model(model: FlamingoCore, checkpoint: ForeignCheckpoint) -> None:
    """Raise UserError for a checkpoint of another language model or another interval than the model's."""
    theirs, ours = checkpoint.decoder_layers, model.decoder_layers_attr_name
    if theirs not in (None, ours):
        raise UserError(
            f"checkpoint is for another language model: its decoder layers are at {theirs}, this model's at "
            f"{ours}; build the model around the language model that the checkpoint was trained with"
        )
    blocks = [k for k, block in enumerate(model.gated_cross_attn_layers) if block is not None]
    prefix = CROSS_ATTENTION.prefix
    names = (name.removeprefix(prefix) for name in checkpoint.bridge if name.startswith(prefix))
    stored = sorted({int(name.partition(".")[0]) for name in names})
    if stored and stored != blocks:
        raise UserError(
            f"checkpoint has cross-attention before layers {first_few(stored)}, this model before "
            f"{first_few(blocks)}; build the model with cross_attn_every_n_layers={stored[0] + 1} and the "
            "language model of the checkpoint"
        )


def _check_vocabulary(model: FlamingoCore, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for a checkpoint whose vocabulary lacks tokens whose rows are read from it."""
    if model.token_rows is None:
        return
    last = max(model.token_rows.token_ids)
    for name in _vocabulary_matrices(model):
        if name in tensors and len(tensors[name]) <= last:
            raise UserError(
                f"checkpoint has a vocabulary of {len(tensors[name])} tokens, but the model's go up to id "
                f"{last} of {len(model.get_parameter(name))}; build the model with the tokenizer of the "
                "checkpoint"
            )


@torch.no_grad()
def _load_token_rows(model: FlamingoCore, tensors: Mapping[str, Tensor]) -> list[str]:
    """Load the rows of new tokens from the checkpoint, and those it lacks from the language model.

    The checkpoint's are not read from the language model, where they are rounded to its dtype: the hash of a
    bridge would depend on how the language model was loaded. Return the names of those that
    the language model gave.
    """
    if model.token_rows is None:
        return []
    model.token_rows.copy_from(model.lang_encoder)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    copied = []
    for name, rows in _vocabulary_matrices(model).items():
        if name in tensors:
            rows.weight.copy_(tensors[name][list(model.token_rows.token_ids)])
        else:
            copied.append(names[id(rows.weight)])
    return copied


def _vocabulary_matrices(model: FlamingoCore) -> dict[str, nn.Embedding]:
    """Return the names of the input embedding and, untied, the output head, each with its token rows."""
    lm, rows = model.lang_encoder, model.token_rows
    assert rows is not None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(input_embedding(lm).weight)]: rows.input}
    head = output_head(lm)
    if head is not None and rows.output is not None:
        matrices[names[id(head.weight)]] = rows.output
    return matrices


def _compare(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], vocabulary: int) -> LoadReport:
    report = LoadReport(missing=[name for name in targets if name not in tensors])
    for name, tensor in tensors.items():
        if name not in targets:
            report.unexpected.append(name)
        elif _fits(tensor, targets[name], vocabulary):
            report.loaded.append(name)
        else:
            stored, needed = tuple(tensor.shape), tuple(targets[name].shape)
            report.mismatched.append(f"{name} (must be {needed}, got {stored})")
    return report


def _fits(tensor: Tensor, target: Tensor, vocabulary: int) -> bool:
    """Return whether the shapes agree.

    A vocabulary matrix may have fewer rows: OpenFlamingo cuts padding rows.
    """
    if tensor.shape == target.shape:
        return True
    is_vocabulary = target.dim() == tensor.dim() == 2 and len(target) == vocabulary
    return is_vocabulary and tensor.shape[1] == target.shape[1] and len(tensor) < vocabulary


def _check_bridge(report: LoadReport, quantized: bool) -> None:
    missing = [name for name in report.missing if name.startswith(BRIDGE_PREFIXES)]
    unknown = [name for name in report.unexpected if name.startswith(BRIDGE_PREFIXES)]
    remedy = "build the model with the sizes of the checkpoint"
    if quantized:
        remedy += ", and with unquantized backbones if the checkpoint has their layers"
    for what, names in (("lacks", missing), ("does not fit", report.mismatched), ("has unknown", unknown)):
        if names:
            raise UserError(
                f"checkpoint {what} {len(names)} of the model's weights: {first_few(names)}; {remedy}"
            )
