"""Initialize the bridge from an adapter, a merged model, a composition, or another Flamingo's checkpoint.

What a run starts from and leaves frozen is not in its adapter: it is part of the adapter's base, which the
adapter records with a content hash and finds again when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.errors import UserError
from flamingo_ft.formats import read_checkpoint
from flamingo_ft.formats.foreign_checkpoint import RECOMPUTED_BUFFERS
from flamingo_ft.formats.stored_files import first_few, read_config_json
from flamingo_ft.hub import fetch_model, hub_name, pinned_name
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS, CONFIG_FILE, TRAINING_CHECKPOINTS, SafetensorsFolder
from flamingo_ft.model import (
    FlamingoConfig,
    FlamingoForConditionalGeneration,
    FlamingoImageProcessor,
    load_open_flamingo,
)
from flamingo_ft.model.parts import cast_parameter, in_bridge, is_lora
from flamingo_ft.model.pretrained import is_partial, named_composition

from .files import (
    BRIDGE_FILE,
    candidate_paths,
    read_config,
    read_flamingo_config,
    read_lora_config,
    read_safetensors,
    read_tensors,
)
from .start_differences import check_same_settings, tile_tags


def init_bridge(
    model: FlamingoForConditionalGeneration,
    start: str | Path,
    images: FlamingoImageProcessor | None = None,
) -> None:
    """Load the bridge of ``start`` into ``model`` and record it, and what it was trained on, in the model's
    configuration.

    images: the model's, which must divide images into tiles as those of ``start``; None not to check that.

    Raises UserError for a bridge of another shape or of other backbones, and if ``start`` has learned more
    than its bridge (LoRA was merged into its language model), which would be lost.
    """
    path = fetch_model(start)
    if is_foreign_checkpoint(path):
        _check_visibility(model.config, path)
    else:
        config = _read_any_config(path)
        check_same_settings(model.config, config, path, images)
        _check_compatible(model.config, config, path)
        model.config.trained_on = config.trained_on
    copied_rows = _load_bridge(model, path)
    record = {"path": pinned_name(start, path), "sha256": _bridge_sha256(model, copied_rows)}
    model.config.bridge_init = record | ({"unhashed": copied_rows} if copied_rows else {})


def load_recorded_bridge(
    model: FlamingoForConditionalGeneration, folder: Path, start: str | Path | None = None
) -> None:
    """Load the bridge that the model's configuration, read from ``folder``, records.

    Args:
        start: where that bridge is now, if neither at its recorded path nor beside ``folder``.

    Raises:
        UserError: the bridge is not there, or is another one.
    """
    _load_recorded(model, folder, model.config.bridge_init or {}, start)


def _bridge_sha256(model: FlamingoForConditionalGeneration, unhashed: Iterable[str]) -> str:
    """Return the hash of a bridge.

    unhashed: rows of new tokens from the language model, which depend on the dtype that it was loaded in.
    """
    return tensors_sha256({name: t for name, t in bridge_tensors(model).items() if name not in unhashed})


def _load_bridge(model: FlamingoForConditionalGeneration, start: Path) -> list[str]:
    """Load the bridge at ``start``; for an adapter, on top of the bridge that it builds on.

    A bridge that was trained without tiles reads each tile as it read images. Return the names of the rows of
    new tokens that a checkpoint lacks, which are the language model's.
    """
    tile_embs = model.perceiver.tile_embs
    if tile_embs is not None:
        torch.nn.init.zeros_(tile_embs)
    if is_foreign_checkpoint(start):
        report = load_open_flamingo(model, start)
        if lost := [name for name in report.unexpected if not RECOMPUTED_BUFFERS.fullmatch(name)]:
            raise UserError(
                f"model.init_from: {start} holds {first_few(lost)}, for which the model has no place"
            )
        return report.copied_rows
    if not (start / ADAPTER_WEIGHTS).is_file():
        copy_bridge(model, own_bridge_tensors(start))
    else:
        record = read_config(start).bridge_init
        if record:
            _load_recorded(model, start, record)
        copy_bridge(model, own_bridge_tensors(start))
    return []


def _load_recorded(
    model: FlamingoForConditionalGeneration,
    folder: Path,
    record: Mapping[str, Any],
    start: str | Path | None = None,
) -> None:
    """Load the bridge that the adapter in ``folder`` builds on, in the dtype that it was trained with.

    Raises UserError if the bridge is gone or is another one.
    """
    load_bridge_as_stored(model, folder, record, start)
    for name, parameter in model.named_parameters():
        if in_bridge(name):
            cast_parameter(name, parameter, getattr(torch, record.get("dtype", "float32")))


def load_bridge_as_stored(
    model: FlamingoForConditionalGeneration,
    folder: Path,
    record: Mapping[str, Any],
    start: str | Path | None = None,
) -> None:
    """Load the bridge that the adapter in ``folder`` builds on, in its stored dtypes, as it was hashed."""
    path = _locate_bridge(folder, record["path"], start)
    _load_bridge(model, path)
    unhashed = list(record.get("unhashed", ()))
    if tile_tags(_read_any_config(folder)) != "learned":  # a later run added tiles
        unhashed.append("perceiver.tile_embs")
    digest = _bridge_sha256(model, unhashed)
    if digest != record["sha256"]:
        raise UserError(
            f"{folder}: base mismatch: the adapter was trained on a bridge with SHA-256 "
            f"{record['sha256'][:12]}, got {digest[:12]} in {path}; restore that bridge, or "
            "name its folder with --start (in Python start=)"
        )


def _locate_bridge(folder: Path, recorded: str, start: str | Path | None) -> Path:
    """Return where a recorded bridge is now: ``start``, or the first place that has it.

    The places are the recorded path, beside the adapter that builds on it, the composition that the adapter
    names, and the Hub.
    """
    if start is not None:
        return fetch_model(start)
    candidates = candidate_paths(folder, recorded)
    for path in candidates:
        if path.exists():
            return path
    if bridge := _bridge_of_composition(folder):
        return bridge
    if hub_name(recorded):
        return fetch_model(recorded)
    searched = ", ".join(str(path.absolute()) for path in candidates)
    raise UserError(
        f"{folder}: builds on the bridge of {recorded}, which is not there (looked at {searched}); put it "
        "beside the adapter, or say where it is now (--start PATH, start=...)"
    )


def _bridge_of_composition(folder: Path) -> Path | None:
    """Return the bridge in the composition that an adapter names as its base, or None."""
    name = named_composition(folder)
    if name is None:
        return None
    bridge = fetch_model(name) / BRIDGE_FILE
    return bridge if bridge.is_file() else None


def lora_to_start_from(start: str | Path | None) -> dict[str, Tensor]:
    """Return the LoRA tensors of an adapter to start from; none for anything else."""
    folder = None if start is None else fetch_model(start)
    if folder is None or not (folder / ADAPTER_WEIGHTS).is_file() or read_lora_config(folder) is None:
        return {}
    return {name: tensor for name, tensor in read_tensors(folder).items() if is_lora(name)}


def bridge_tensors(model: FlamingoForConditionalGeneration) -> dict[str, Tensor]:
    """Return the tensors of the whole bridge, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if in_bridge(name)}


@torch.no_grad()
def copy_bridge(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor]) -> None:
    """Set parameters of the bridge, in the dtypes of ``tensors``.

    Raises UserError for a tensor that does not fit.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(
                f"model.init_from: {name} {tuple(tensor.shape)} does not fit this model; "
                "start from a bridge of its shape"
            )
        parameters[name].data = tensor.to(parameters[name].device, copy=True)


def read_bridge_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the whole bridge of an adapter or a whole model, by name, with what an adapter builds on."""
    if is_foreign_checkpoint(folder):
        raise UserError(
            f"{folder}: the matrices of another Flamingo's checkpoint cannot be read one by one; start from "
            "an adapter of it"
        )
    record = read_config(folder).bridge_init if (folder / ADAPTER_WEIGHTS).is_file() else None
    below = read_bridge_tensors(_locate_bridge(folder, record["path"], None)) if record else {}
    return below | own_bridge_tensors(folder)


def own_bridge_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the bridge's tensors in a folder or a file, by their names in a model without LoRA.

    Those of an adapter lack what it builds on.
    """
    if folder.name == BRIDGE_FILE or (folder / BRIDGE_FILE).is_file():
        return read_safetensors(folder if folder.name == BRIDGE_FILE else folder / BRIDGE_FILE)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if is_partial(folder):
            raise UserError(
                f"model.init_from: {folder} names backbones and has no bridge; leave it out, or start from "
                "an adapter"
            )
        with SafetensorsFolder(folder) as files:
            return {name: files[name] for name in files.names() if in_bridge(name)}
    own = read_tensors(folder)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in own.items() if not is_lora(name)}


def _read_any_config(folder: Path) -> FlamingoConfig:
    if (folder / ADAPTER_WEIGHTS).is_file():
        return read_config(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"model.init_from: {folder} holds no adapter, merged model or checkpoint; give one of these"
        )
    return read_flamingo_config(folder)


def is_foreign_checkpoint(start: Path) -> bool:
    """Return whether this is another Flamingo's checkpoint: a file, or a folder with one, or Otter's."""
    if start.is_file():
        return start.name != BRIDGE_FILE
    config = read_config_json(start)
    return config.get("model_type") == "otter" or (
        not config and any((start / name).is_file() for name in TRAINING_CHECKPOINTS)
    )


def _check_visibility(config: FlamingoConfig, start: Path) -> None:
    """Refuse a media visibility that a checkpoint was not trained with.

    In OpenFlamingo's first version text saw, at random, the image before it or the one after it.
    """
    checkpoint = read_checkpoint(start)
    allowed = ("immediate", "all_preceding")
    if checkpoint.visibility == "following":
        allowed = ("following", "immediate")
    if config.media_visibility not in allowed:
        raise UserError(
            f"model.init_from: {start} is a checkpoint of {checkpoint.format}, made for media_visibility "
            f"{allowed[0]}; the recipe has {config.media_visibility}: give it {' or '.join(allowed)}"
        )


def _check_compatible(config: FlamingoConfig, start_config: FlamingoConfig, start: Path) -> None:
    """Raise UserError unless ``start`` has the model's backbones and learned no more than its bridge."""
    for part in ("vision", "language"):
        source = (start_config.backbones or {}).get(part, {})
        if source.get("sha256") != (config.backbones or {}).get(part, {}).get("sha256"):
            raise UserError(
                f"model.init_from: {start} belongs to another {part} backbone, {source.get('name')}; use "
                "that one"
            )
    if getattr(start_config, "quantization_config", None):
        raise UserError(
            f"model.init_from: {start} was written quantized; start from the adapter, or from an "
            "unquantized merge"
        )
    merged = start_config.merged or {}
    if merged.get("own_backbones"):
        raise UserError(
            f"model.init_from: {start} has backbones of its own, which would be lost; "
            "start from the checkpoint that it was converted from"
        )
    if any(part in ("language", "vision") for part in merged.get("lora") or []):
        raise UserError(
            f"model.init_from: LoRA was folded into the backbones of {start}, and would be lost; "
            "start from the adapter that it was merged from"
        )
