"""The files of a checkpoint: one file of torch's or safetensors', or a folder in transformers' form."""

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

from .tensors_only import load_tensors

WRAPPING = "model_state_dict"  # where training loops put the weights, beside optimizer and schedule
OF_SEVERAL_DEVICES = "module."
OWN = "flamingo"  # the model_type of this package's models


@dataclass(frozen=True)
class Stored:
    """Tensors by the names they are kept under; beside: what else the file holds; config: the folder's config.json.

    wrapped: how the names were found, in words.
    """

    where: Path
    tensors: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()


def read_stored(path: Path) -> Stored:
    """Read a checkpoint's file or folder. UserError where it is missing, damaged or holds no dict of tensors."""
    path = existing_path(path)
    config = stored_config(path if path.is_dir() else path.parent)
    if path.is_dir() and config.get("model_type") == OWN:
        raise UserError(
            f"{path}: is of this package already; write it for others with --to open_flamingo or --to otter"
        )
    contents = [_read(file) for file in _files(path)]
    if len(contents) == 1:
        return unwrap(contents[0], path, config)
    together = {
        name: tensor for content in contents for name, tensor in unwrap(content, path).tensors.items()
    }
    return unwrap(together, path, config)


def unwrap(content: Any, where: Path, config: Mapping[str, Any] | None = None) -> Stored:
    """The weights of what a file holds, under their bare names."""
    content = content if isinstance(content, Mapping) else {}
    inner = content.get(WRAPPING, content)
    beside = {key: value for key, value in content.items() if key != WRAPPING} if inner is not content else {}
    inner = inner if isinstance(inner, Mapping) else {}
    tensors = {str(key).removeprefix(OF_SEVERAL_DEVICES): value for key, value in inner.items()}
    _check_tensors(tensors, where)
    marks = {f"inside {WRAPPING}": inner is not content, f"{OF_SEVERAL_DEVICES} prefix": _has_prefix(inner)}
    return Stored(
        where, tensors, beside, dict(config or {}), tuple(mark for mark, found in marks.items() if found)
    )


def _has_prefix(content: Mapping[Any, Any]) -> bool:
    return any(str(key).startswith(OF_SEVERAL_DEVICES) for key in content)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for index in (path / name for name in INDEX_FILES):
        if index.is_file():
            return [path / shard for shard in shard_names(index)]
    found = [path / name for name in CHECKPOINT_FILES if (path / name).is_file()]
    if not found:
        raise UserError(
            f"{path}: found no weights there ({', '.join(CHECKPOINT_FILES)}); give a checkpoint's file or folder"
        )
    return found[:1]


def _read(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return load_tensors(file)
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such checkpoint; check the path") from None
    except SafetensorError as error:
        reraise_machine_error(error)
        raise UserError(
            f"{file}: not a readable safetensors file ({error_message(error)}); copy it again"
        ) from None


def stored_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, {} where there is none. UserError where it is damaged."""
    file = folder / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: is no JSON ({error_message(error)}); copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: is no configuration (found a {type(found).__name__}); copy the checkpoint again"
        )
    return found


def _check_tensors(tensors: Mapping[str, Any], where: Path) -> None:
    other = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if other or not tensors:
        found = f"{some(other)} as something else" if other else "no names at all"
        raise UserError(
            f"{where}: checkpoint is no dict of names and tensors: found {found}; give a model's state dict"
        )


def some(items: list[Any]) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
