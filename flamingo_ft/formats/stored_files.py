"""Read the files of a checkpoint: one file of torch or safetensors, or a folder as transformers writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.names import existing_path
from flamingo_ft.hub.weight_files import CHECKPOINT_FILES, CONFIG_FILE, INDEX_FILES, shard_names
from flamingo_ft.machine_errors import reraise_machine_error

from .safe_unpickling import load_torch_file

NESTED_STATE_DICT = "model_state_dict"  # where training loops put the weights, beside optimizer and schedule
DDP_PREFIX = "module."  # of a state dict saved from DistributedDataParallel
OWN_MODEL_TYPE = "flamingo"  # of this package's models


@dataclass(frozen=True)
class StoredTensors:
    """A state dict as read from files.

    path: the file or folder. tensors: by their keys in the file, without DDP's prefix.
    extras: what the file holds beside the state dict. config: the config.json beside it, {} without one.
    wrapping: how the state dict was wrapped, in words.
    """

    path: Path
    tensors: dict[str, Tensor]
    extras: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    wrapping: tuple[str, ...] = ()


def read_checkpoint_files(path: Path) -> StoredTensors:
    """Read a checkpoint's file or folder. Raises UserError if it is missing, damaged or not a state dict."""
    path = existing_path(path)
    config = read_config_json(path if path.is_dir() else path.parent)
    if path.is_dir() and config.get("model_type") == OWN_MODEL_TYPE:
        raise UserError(
            f"{path}: already in flamingo-ft's format; export it with --to open_flamingo or --to otter"
        )
    contents = [_read(file) for file in _weight_files(path)]
    if len(contents) == 1:
        return unwrap_state_dict(contents[0], path, config)
    shards: dict[str, Tensor] = {}
    for content in contents:
        shards |= unwrap_state_dict(content, path).tensors
    return unwrap_state_dict(shards, path, config)


def unwrap_state_dict(content: Any, path: Path, config: Mapping[str, Any] | None = None) -> StoredTensors:
    """Find the state dict in the content of a file. Raises UserError, naming ``path``, if there is none."""
    content = content if isinstance(content, Mapping) else {}
    is_nested = NESTED_STATE_DICT in content
    state_dict = content[NESTED_STATE_DICT] if is_nested else content
    state_dict = state_dict if isinstance(state_dict, Mapping) else {}
    tensors = {str(key).removeprefix(DDP_PREFIX): value for key, value in state_dict.items()}
    _check_tensors(tensors, path)
    wrapping = []
    if is_nested:
        wrapping.append(f"inside {NESTED_STATE_DICT}")
    if any(str(key).startswith(DDP_PREFIX) for key in state_dict):
        wrapping.append(f"{DDP_PREFIX} prefix")
    extras = {key: value for key, value in content.items() if key != NESTED_STATE_DICT} if is_nested else {}
    return StoredTensors(path, tensors, extras, dict(config or {}), tuple(wrapping))


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for index in (path / name for name in INDEX_FILES):
        if index.is_file():
            return [path / shard for shard in shard_names(index)]
    for file in (path / name for name in CHECKPOINT_FILES):
        if file.is_file():
            return [file]
    raise UserError(
        f"{path}: no weights ({', '.join(CHECKPOINT_FILES)}); give the file or folder of a checkpoint"
    )


def _read(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return load_torch_file(file)
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such checkpoint; check the path") from None
    except SafetensorError as error:
        reraise_machine_error(error)
        raise UserError(
            f"{file}: not a readable safetensors file ({error_message(error)}); copy it again"
        ) from None


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json; {} if there is none. Raises UserError if it is damaged."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: invalid JSON ({error_message(error)}); copy the checkpoint again") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{file}: expected a JSON object, got a {type(config).__name__}; copy the checkpoint again"
        )
    return config


def _check_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    others = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        problem = f"values of {first_few(others)} are not tensors" if others else "got no tensors"
        raise UserError(f"{path}: not a state dict, {problem}; give the state dict of a model")


def first_few(items: list[Any]) -> str:
    """Join the first four items for a message."""
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
