"""Load torch files without running code: only tensors and plain containers are rebuilt.

A pickle names the classes and functions that rebuild its objects, and calls them. Checkpoints of training
loops hold such objects beside their tensors (arguments, configurations of libraries that need not be
installed). Here a stand-in that only stores its arguments takes the place of everything that is not a tensor.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import MAX_MESSAGE_CHARACTERS, one_line
from flamingo_ft.machine_errors import reraise_machine_error

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
