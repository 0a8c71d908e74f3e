"""Tensors of a model's folder, read one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import SAFETENSORS_FILE, SAFETENSORS_INDEX, shard_names


class WeightFiles:
    """The tensors of a folder in transformers' form by name, each read from its shard when asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._opened = ExitStack()
        self._files: dict[str, safe_open] = {}

    def __enter__(self) -> WeightFiles:
        for shard in self._shards():
            file = self._opened.enter_context(safe_open(shard, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error: object) -> None:
        self._files = {}
        self._opened.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise UserError(
                f"{self.folder}: found no tensor {name}; its weights are kept under other names there"
            )
        return self._files[name].get_tensor(name)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._files)

    def _shards(self) -> list[Path]:
        if (self.folder / SAFETENSORS_FILE).is_file():
            return [self.folder / SAFETENSORS_FILE]
        index = self.folder / SAFETENSORS_INDEX
        if not index.is_file():
            raise UserError(f"{self.folder}: no {SAFETENSORS_FILE}; give a model in the safetensors format")
        return [self.folder / name for name in shard_names(index)]
