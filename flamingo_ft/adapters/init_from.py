"""Where a bridge starts from: an adapter, a merged model, a composition, or another Flamingo's checkpoint.

What a run starts from and leaves frozen is not in its adapter: it is part of the adapter's base, which the adapter
records with a content hash and finds again when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.safetensors_folder import SafetensorsFolder
from flamingo_ft.errors import UserError
from flamingo_ft.formats import read_checkpoint
from flamingo_ft.formats.foreign_checkpoint import RECOMPUTED_BUFFERS
from flamingo_ft.formats.stored_files import first_few, read_config_json
from flamingo_ft.hub import fetch_model, hub_name, pinned_name
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, TRAINING_CHECKPOINTS
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, load_open_flamingo
from flamingo_ft.model.parts import in_bridge, is_lora
from flamingo_ft.model.pretrained import is_partial, named_composition

from .files import (
    BRIDGE_FILE,
    candidate_paths,
    read_bridge,
    read_config,
    read_flamingo_config,
    read_lora_config,
    read_tensors,
)
from .trainable import cast_parameter

# What must be the same for a bridge to mean the same in another model.
GEOMETRY = ("cross_attn_every_n_layers", "media_visibility", "perceiver", "cross_attention", "new_token_ids")


def init_bridge(model: FlamingoForConditionalGeneration, start: str | Path) -> None:
    """Give ``model`` the bridge of ``start`` and record it in the model's configuration.

    Raises UserError for a bridge of another shape or of other backbones, and where ``start`` has learned more than a
    bridge that the model would go without (its language model was merged with LoRA).
    """
    place = fetch_model(start)
    if is_foreign_checkpoint(place):
        _check_visibility(model.config, place)
    else:
        _check_same(model.config, _config(place), place)
    _load_bridge(model, place)
    model.config.bridge_init = {
        "path": pinned_name(start, place),
        "sha256": tensors_sha256(bridge_tensors(model)),
    }


def load_recorded_bridge(
    model: FlamingoForConditionalGeneration, folder: Path, start: str | Path | None = None
) -> None:
    """Give ``model`` the bridge that its configuration, read from ``folder``, records.

    start: where that bridge lies now, if neither where it lay nor beside ``folder``. Raises UserError when it is not
    there, or another one.
    """
    _load_recorded(model, folder, model.config.bridge_init, start)


def _load_bridge(model: FlamingoForConditionalGeneration, start: Path) -> None:
    """Put the bridge that lies at ``start`` in place, for an adapter on top of the one that it builds on."""
    if is_foreign_checkpoint(start):
        report = load_open_flamingo(model, start)
        if lost := [name for name in report.unexpected if not RECOMPUTED_BUFFERS.fullmatch(name)]:
            raise UserError(
                f"model.init_from: {start} holds {first_few(lost)}, for which the model has no place"
            )
    elif not (start / ADAPTER_WEIGHTS).is_file():
        copy_bridge(model, _tensors(start))
    else:
        record = read_config(start).bridge_init
        if record:
            _load_recorded(model, start, record)
        copy_bridge(model, _tensors(start))


def _load_recorded(
    model: FlamingoForConditionalGeneration,
    folder: Path,
    record: Mapping[str, str],
    start: str | Path | None = None,
) -> None:
    """Put in place what the adapter in ``folder`` builds on, as it was when that was trained; UserError when it is gone or
    another."""
    load_bridge_as_stored(model, folder, record, start)
    for name, parameter in model.named_parameters():
        if in_bridge(name):
            cast_parameter(name, parameter, getattr(torch, record.get("dtype", "float32")))


def load_bridge_as_stored(
    model: FlamingoForConditionalGeneration,
    folder: Path,
    record: Mapping[str, str],
    start: str | Path | None = None,
) -> None:
    """The same in the number formats that it is stored in, which its content hash is of."""
    path = _locate_bridge(folder, record["path"], start)
    _load_bridge(model, path)
    found = tensors_sha256(bridge_tensors(model))
    if found != record["sha256"]:
        raise UserError(
            f"{folder}: adapter of another base: the bridge of {path} had content {record['sha256'][:12]}, "
            f"found {found[:12]}; restore the one that the adapter was trained on"
        )


def _locate_bridge(folder: Path, recorded: str, start: str | Path | None) -> Path:
    """Where a bridge lies now: at ``start`` where that is given, else where it lay, beside the adapter that builds on it,
    in the adapter's base, or on the Hub."""
    if start is not None:
        return fetch_model(start)
    places = candidate_paths(folder, recorded)
    path = next((place for place in places if place.exists()), None) or _bridge_of_composition(folder)
    if path is None and hub_name(recorded):
        return fetch_model(recorded)
    if path is None:
        looked = ", ".join(str(place.absolute()) for place in places)
        raise UserError(
            f"{folder}: builds on the bridge of {recorded}, which is not there (looked at {looked}); put it beside the "
            "adapter, or say where it is now (--start PATH, start=...)"
        )
    return path


def _bridge_of_composition(folder: Path) -> Path | None:
    """The bridge in the composition that an adapter names as its base; None where it names only its language model."""
    name = named_composition(folder)
    if name is None:
        return None
    bridge = fetch_model(name) / BRIDGE_FILE
    return bridge if bridge.is_file() else None


def lora_to_start_from(start: str | Path | None) -> dict[str, Tensor]:
    """The LoRA tensors that an adapter to start from has; none for anything else."""
    folder = None if start is None else fetch_model(start)
    if folder is None or not (folder / ADAPTER_WEIGHTS).is_file() or read_lora_config(folder) is None:
        return {}
    return {name: tensor for name, tensor in read_tensors(folder).items() if is_lora(name)}


def bridge_tensors(model: FlamingoForConditionalGeneration) -> dict[str, Tensor]:
    """The whole bridge, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if in_bridge(name)}


@torch.no_grad()
def copy_bridge(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor]) -> None:
    """Put parts of a bridge in place, in the number formats that they were kept in. UserError for what does not fit."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(
                f"model.init_from: {name} {tuple(tensor.shape)} does not fit; start from a bridge of this shape"
            )
        parameters[name].data = tensor.to(parameters[name].device, copy=True)


def read_bridge_tensors(folder: Path) -> dict[str, Tensor]:
    """The whole bridge of an adapter or a whole model, by name; what an adapter builds on comes from there."""
    if is_foreign_checkpoint(folder):
        raise UserError(
            f"{folder}: the matrices of a checkpoint cannot be read one by one; start from an adapter of it"
        )
    record = read_config(folder).bridge_init if (folder / ADAPTER_WEIGHTS).is_file() else None
    below = read_bridge_tensors(_locate_bridge(folder, record["path"], None)) if record else {}
    return below | _tensors(folder)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the bridge that are in a folder, or are such a file, under the names they have in a model without LoRA."""
    if folder.name == BRIDGE_FILE or (folder / BRIDGE_FILE).is_file():
        return read_bridge(folder if folder.name == BRIDGE_FILE else folder / BRIDGE_FILE)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if is_partial(folder):
            raise UserError(
                f"model.init_from: {folder} names backbones and has no bridge; leave it out, or start from an adapter"
            )
        with SafetensorsFolder(folder) as files:
            return {name: files[name] for name in files.names() if in_bridge(name)}
    own = read_tensors(folder)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in own.items() if not is_lora(name)}


def _config(folder: Path) -> FlamingoConfig:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return read_config(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.init_from: {folder} holds no adapter, no merged model and is no checkpoint; give one of these"
        )
    return read_flamingo_config(folder)


def is_foreign_checkpoint(start: Path) -> bool:
    """Whether this is another Flamingo's checkpoint: a file, a folder that says so, or one with such a file alone."""
    if start.is_file():
        return start.name != BRIDGE_FILE
    config = read_config_json(start)
    return config.get("model_type") == "otter" or (
        not config and any((start / name).is_file() for name in TRAINING_CHECKPOINTS)
    )


def _check_visibility(wanted: FlamingoConfig, start: Path) -> None:
    """Refuse text that sees images which it was not trained to see: version 1 saw the one before it or after it, by chance."""
    found = read_checkpoint(start)
    fitting = (
        ("following", "immediate") if found.visibility == "following" else ("immediate", "all_preceding")
    )
    if wanted.media_visibility not in fitting:
        raise UserError(
            f"model.init_from: {start} is a checkpoint of {found.format}, made for media_visibility {fitting[0]}; the recipe "
            f"has {wanted.media_visibility}: give it {' or '.join(fitting)}"
        )


def _check_same(wanted: FlamingoConfig, found: FlamingoConfig, start: Path) -> None:
    for key in GEOMETRY:
        ours, theirs = getattr(wanted, key), getattr(found, key)
        if ours != theirs:
            raise UserError(
                f"model.init_from: {start} has {key} {theirs}, the recipe {ours}; give the recipe the same"
            )
    for part in ("vision", "language"):
        ours, theirs = ((config.backbones or {}).get(part, {}).get("sha256") for config in (wanted, found))
        if ours != theirs:
            name = (found.backbones or {}).get(part, {}).get("name")
            raise UserError(
                f"model.init_from: {start} belongs to another {part} backbone, {name}; use that one"
            )
    if getattr(found, "quantization_config", None):
        raise UserError(
            f"model.init_from: {start} was written quantized; start from the adapter, or from an unquantized merge"
        )
    if (found.merged or {}).get("own_backbones"):
        raise UserError(
            f"model.init_from: {start} has backbones of its own, which would be lost; start from the checkpoint that it was "
            "converted from"
        )
    folded = (found.merged or {}).get("lora") or []
    if any(part in ("language", "vision") for part in folded):
        raise UserError(
            f"model.init_from: LoRA was folded into the backbones of {start}, and would be lost; "
            "start from the adapter that it was merged from"
        )
