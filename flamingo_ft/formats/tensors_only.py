"""Torch files without running what is in them: tensors and plain containers come out, everything else is inert.

A pickle names the classes and functions that rebuild its objects, and calls them. Checkpoints of training loops hold such
objects beside their tensors (arguments, configurations of libraries that need not be installed). Here whatever is no tensor
is rebuilt by a stand-in that only remembers what it was given.
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

# What torch and pickle raise for files that are cut, damaged or of another kind.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
)

_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")


def load_tensors(path: Path) -> Any:
    """The content of a torch file, tensors on the CPU and mapped from the disk where the format allows it.

    Raises UserError for a file that is missing, cannot be read or is none of torch's.
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
    options = {"map_location": "cpu", "mmap": _is_zip(path)}
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError:
        return torch.load(path, weights_only=False, pickle_module=_Inert, **options)


def _is_zip(path: Path) -> bool:
    """Whether torch wrote it as an archive, as since 1.6; only those can be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


class Remembered(dict):
    """Stands in for an object of a class that is not looked up: its entries or attributes, by name."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(named)
        self.__setstate__(arguments)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.update(part)

    def __call__(self, *arguments: Any, **named: Any) -> Remembered:
        return Remembered()

    def append(self, entry: Any) -> None:
        """Lists of their own kind are filled one by one."""
        self[len(self)] = entry

    def extend(self, entries: Any) -> None:
        """Or several at once."""
        for entry in entries:
            self.append(entry)


class _Unpickler(pickle.Unpickler):
    """Knows what rebuilds tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILD:
            return getattr(torch._utils, name)
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return super().find_class(module, name)
        if (module, name) == ("torch", "Size") or isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Remembered,), {"__module__": module})


class _Inert:
    """What torch asks of a pickle module."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()
