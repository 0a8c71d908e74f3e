"""Foreign checkpoints, read into either face of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.backbones.quantization import quantization_formats
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint, parse_checkpoint, read_checkpoint
from flamingo_ft.formats.foreign_checkpoint import BRIDGE_PREFIXES, has_wrapped_layers
from flamingo_ft.formats.stored_files import first_few, unwrap_state_dict

from .core import FlamingoCore


@dataclass
class LoadReport:
    """What a checkpoint and a model did not share; names are the model's.

    Loading fails on a mismatch and on a missing weight of the bridge; a missing one of the backbones is only told:
    the files never hold them all.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)


def is_open_flamingo(state_dict: Mapping[str, Any]) -> bool:
    """Whether the keys are OpenFlamingo's, bare or as its training saved them."""
    content = state_dict.get("model_state_dict", state_dict)
    return has_wrapped_layers(str(key).removeprefix("module.") for key in content)


def load_open_flamingo(model: FlamingoCore, checkpoint: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load a checkpoint of OpenFlamingo or Otter (a path, or its state dict) into ``model``, in place.

    Every weight of the bridge must be there and fit; of the backbones, what the file holds is taken: an Otter's folder
    brings its own. Raises
    UserError, with nothing loaded, when the file is for another language model or interval or lacks a bridge weight.
    """
    is_read = isinstance(checkpoint, Mapping)
    found = (
        parse_checkpoint(unwrap_state_dict(checkpoint, Path("checkpoint")))
        if is_read
        else read_checkpoint(Path(checkpoint))
    )
    check_belongs(model, found)
    if found.lora:
        raise UserError(
            f"{found.path}: holds LoRA, which would be lost here; bring it in with flamingo-ft convert"
        )
    tensors = found.tensors()
    targets = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("token_rows.")
    }
    report = _compare(tensors, targets, vocabulary=len(model.lang_encoder.get_input_embeddings().weight))
    _check(report, bool(quantization_formats(model)))
    _check_rows(model, tensors)
    with torch.no_grad():
        for name in report.loaded:
            targets[name][: len(tensors[name])].copy_(tensors[name])
    if model.token_rows is not None:
        model.token_rows.copy_from(model.lang_encoder)
    return report


def _check_rows(model: FlamingoCore, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a vocabulary that ends before the tokens whose rows the model takes from it."""
    if model.token_rows is None:
        return
    name, own = next(
        (n, p) for n, p in model.named_parameters() if p is model.lang_encoder.get_input_embeddings().weight
    )
    if name in tensors and len(tensors[name]) <= max(model.token_rows.token_ids):
        raise UserError(
            f"checkpoint's vocabulary ends at {len(tensors[name])}, the model's new tokens reach "
            f"{max(model.token_rows.token_ids)} of {len(own)}; build the model with the tokenizer of the checkpoint"
        )


def check_belongs(model: FlamingoCore, checkpoint: ForeignCheckpoint) -> None:
    """Refuse a checkpoint of another language model or interval than the model has."""
    found, wanted = checkpoint.decoder_layers, model.decoder_layers_attr_name
    if found not in (None, wanted):
        raise UserError(
            f"checkpoint is for another language model: its decoder layers are at {found}, this model's at {wanted}; "
            "build the model around the language model that the checkpoint was trained with"
        )
    _check_interval(model, checkpoint.bridge)


def _check_interval(model: FlamingoCore, tensors: Mapping[str, Tensor]) -> None:
    wanted = [k for k, block in enumerate(model.gated_cross_attn_layers) if block is not None]
    found = sorted(
        {int(name.split(".")[1]) for name in tensors if name.startswith("gated_cross_attn_layers.")}
    )
    if found and found != wanted:
        raise UserError(
            f"checkpoint has cross-attention before layers {first_few(found)}, this model before {first_few(wanted)}; "
            f"build the model with cross_attn_every_n_layers={found[0] + 1} and the language model of the checkpoint"
        )


def _compare(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], vocabulary: int) -> LoadReport:
    report = LoadReport(missing=[name for name in targets if name not in tensors])
    for name, tensor in tensors.items():
        if name not in targets:
            report.unexpected.append(name)
        elif _fits(tensor, targets[name], vocabulary):
            report.loaded.append(name)
        else:
            found, wanted = tuple(tensor.shape), tuple(targets[name].shape)
            report.mismatched.append(f"{name} (found {found}, wanted {wanted})")
    return report


def _fits(tensor: Tensor, target: Tensor, vocabulary: int) -> bool:
    """Same shape; a matrix of the vocabulary may have fewer rows, as OpenFlamingo cuts padding rows off."""
    if tensor.shape == target.shape:
        return True
    is_vocabulary = target.dim() == tensor.dim() == 2 and len(target) == vocabulary
    return is_vocabulary and tensor.shape[1] == target.shape[1] and len(tensor) < vocabulary


def _check(report: LoadReport, quantized: bool) -> None:
    missing, unknown = (
        [name for name in names if name.startswith(BRIDGE_PREFIXES)]
        for names in (report.missing, report.unexpected)
    )
    remedy = "build the model with the sizes of the checkpoint"
    if quantized:
        remedy += ", its backbones unquantized where the checkpoint holds their layers"
    for what, names in (("lacks", missing), ("does not fit", report.mismatched), ("has unknown", unknown)):
        if names:
            raise UserError(
                f"checkpoint {what} {len(names)} of the model's weights: {first_few(names)}; {remedy}"
            )
