"""Checkpoints of OpenFlamingo v2, read into either face of the model.

Their keys hold the cross-attention inside the language model's layers, which they wrap:
``lang_encoder.<layers>.{k}.gated_cross_attn_layer.*`` beside ``lang_encoder.<layers>.{k}.decoder_layer.*``. Training
checkpoints wrap the whole in ``model_state_dict``, with a ``module.`` prefix where they come from several devices.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.errors import UserError

from .core import FlamingoCore

_BLOCK = re.compile(r"lang_encoder\.(?P<layers>.+)\.(?P<k>\d+)\.gated_cross_attn_layer\.(?P<rest>.+)")
_BLOCK_AGAIN = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(?P<k>\d+)\.(?P<rest>.+)")
_LAYER = re.compile(r"lang_encoder\.(?P<layers>.+)\.(?P<k>\d+)\.decoder_layer\.(?P<rest>.+)")
_LAYER_AGAIN = re.compile(r"lang_encoder\.old_decoder_blocks\.")
_BRIDGE = ("perceiver.", "gated_cross_attn_layers.")


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
    keys = _unwrap(state_dict).keys()
    return any(_BLOCK.fullmatch(key) or _BLOCK_AGAIN.fullmatch(key) for key in keys)


def load_open_flamingo(model: FlamingoCore, checkpoint: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load an OpenFlamingo v2 checkpoint (a path, or its state dict) into ``model``, in place.

    Every weight of the bridge must be there and fit; of the backbones, what the file holds is taken. Raises
    UserError, with nothing loaded, when the file is for another language model or interval or lacks a bridge weight.
    """
    state_dict = checkpoint if isinstance(checkpoint, Mapping) else read_tensors(Path(checkpoint))
    tensors = _unwrap(state_dict)
    _check_tensors(tensors)
    tensors = _translate(tensors, model.decoder_layers_attr_name)
    targets = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("token_rows.")}
    _check_interval(model, tensors)
    report = _compare(tensors, targets, vocabulary=len(model.lang_encoder.get_input_embeddings().weight))
    _check(report)
    with torch.no_grad():
        for name in report.loaded:
            targets[name][: len(tensors[name])].copy_(tensors[name])
    if model.token_rows is not None:
        model.token_rows.copy_from(model.lang_encoder)
    return report


def read_tensors(path: Path) -> Mapping[str, Any]:
    """The content of a torch file, which may hold tensors and plain containers only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a whole checkpoint file") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, AttributeError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of plain tensors ({reason}); save it again as a state dict") from None


def _unwrap(state_dict: Any) -> dict[str, Tensor]:
    """The state dict under its bare names; empty where the content is none."""
    content = state_dict.get("model_state_dict", state_dict) if isinstance(state_dict, Mapping) else {}
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _check_tensors(state_dict: Mapping[str, Any]) -> None:
    other = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if other or not state_dict:
        found = f"{_some(other)} as something else" if other else "no names at all"
        raise UserError(f"checkpoint is no dict of names and tensors: found {found}; give a model's state dict")


def _translate(state_dict: Mapping[str, Tensor], layers_path: str) -> dict[str, Tensor]:
    """The state dict under this package's names."""
    return {
        _translate_key(key, layers_path): value for key, value in state_dict.items() if not _LAYER_AGAIN.match(key)
    }


def _translate_key(key: str, layers_path: str) -> str:
    if match := _BLOCK.fullmatch(key):
        _check_layers_path(match["layers"], layers_path)
        return f"gated_cross_attn_layers.{match['k']}.{match['rest']}"
    if match := _BLOCK_AGAIN.fullmatch(key):
        return f"gated_cross_attn_layers.{match['k']}.{match['rest']}"
    if match := _LAYER.fullmatch(key):
        return f"lang_encoder.{match['layers']}.{match['k']}.{match['rest']}"
    return key


def _check_layers_path(found: str, wanted: str) -> None:
    if found != wanted:
        raise UserError(
            f"checkpoint is for another language model: its decoder layers are at {found}, this model's at {wanted}; "
            "build the model around the language model that the checkpoint was trained with"
        )


def _check_interval(model: FlamingoCore, tensors: Mapping[str, Tensor]) -> None:
    wanted = [k for k, block in enumerate(model.gated_cross_attn_layers) if block is not None]
    found = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("gated_cross_attn_layers.")})
    if found and found != wanted:
        raise UserError(
            f"checkpoint has cross-attention before layers {_some(found)}, this model before {_some(wanted)}; "
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


def _check(report: LoadReport) -> None:
    missing, unknown = (
        [name for name in names if name.startswith(_BRIDGE)] for names in (report.missing, report.unexpected)
    )
    for what, names in (("lacks", missing), ("does not fit", report.mismatched), ("has unknown", unknown)):
        if names:
            raise UserError(
                f"checkpoint {what} {len(names)} of the model's weights: {_some(names)}; "
                "build the model with the sizes of the checkpoint"
            )


def _some(items: list) -> str:
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
