"""Read the tensors of a model's folder one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import SAFETENSORS_FILE, SAFETENSORS_INDEX, shard_names


class SafetensorsFolder:
    """The tensors in a folder that transformers saved, by name; each is read from its shard when it is asked
    for.

    A context manager: the files are open inside ``with``. Raises UserError for a folder without safetensors
    files, and for a name that it does not hold.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}  # tensor name: the open file that holds it

    def __enter__(self) -> SafetensorsFolder:
        for shard in self._shards():
            file = self._open_files.enter_context(safe_open(shard, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error: object) -> None:
        self._file_of = {}
        self._open_files.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise UserError(f"{self.folder}: no tensor {name}; its weights are stored under other names")
        return self._file_of[name].get_tensor(name)

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._file_of)

    def _shards(self) -> list[Path]:
        if (self.folder / SAFETENSORS_FILE).is_file():
            return [self.folder / SAFETENSORS_FILE]
        index = self.folder / SAFETENSORS_INDEX
        if not index.is_file():
            raise UserError(f"{self.folder}: no {SAFETENSORS_FILE}; give a model in the safetensors format")
        return [self.folder / name for name in shard_names(index)]
