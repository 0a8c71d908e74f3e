"""Read the files of a checkpoint: one file of torch or safetensors, or a folder as transformers writes it.

Torch files are loaded without running code. A pickle names the classes and functions that rebuild its
objects, and calls them. Checkpoints of training loops hold such objects beside their tensors (arguments,
configurations of libraries that need not be installed). Here only tensors and plain containers are rebuilt; a
stand-in that only stores its arguments takes the place of every other object.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import MAX_MESSAGE_CHARACTERS, error_message, one_line
from flamingo_ft.hub.names import existing_path
from flamingo_ft.hub.weight_files import CHECKPOINT_FILES, CONFIG_FILE, INDEX_FILES, shard_names
from flamingo_ft.machine_errors import reraise_machine_error

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


# --- torch files, without running code ---

# Raised by torch and pickle for files that are truncated, damaged or of another kind.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
)

# The functions of torch that a torch file names to rebuild its tensors.
_TENSOR_BUILDERS = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


def load_torch_file(path: Path) -> Any:
    """Load the content of a torch file: tensors on the CPU, memory-mapped if the file format allows it.

    Raises UserError for a file that is missing, unreadable or not torch's.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; check the path") from None
    except OSError as error:
        reraise_machine_error(error)
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a whole checkpoint file") from None
    except UNREADABLE as error:
        reraise_machine_error(error)
        reason = one_line(error, MAX_MESSAGE_CHARACTERS) or "it is empty"
        raise UserError(
            f"{path}: not a checkpoint of plain tensors ({reason}); save it again as a state dict"
        ) from None


def _load(path: Path) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "mmap": _is_zip(path)}
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError:
        return torch.load(path, weights_only=False, pickle_module=_InertPickle, **options)


def _is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive, as torch writes since 1.6; only those can be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


class InertObject(dict):
    """Stand-in for an object whose class is not imported: its entries or attributes, by name."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(named)
        self.__setstate__(arguments)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.update(part)

    def __call__(self, *arguments: Any, **named: Any) -> InertObject:
        return InertObject()

    def append(self, entry: Any) -> None:
        """Take an entry of a pickled subclass of list."""
        self[len(self)] = entry

    def extend(self, entries: Any) -> None:
        """Take several entries of a pickled subclass of list."""
        for entry in entries:
            self.append(entry)


class _Unpickler(pickle.Unpickler):
    """Looks up only what rebuilds tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if is_storage or (module, name) in _TENSOR_BUILDERS:
            return super().find_class(module, name)
        if (module, name) == ("torch", "Size") or isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (InertObject,), {"__module__": module})


class _InertPickle:
    """The part of the pickle module's interface that torch.load uses."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()
