"""Tensors of a model's folder, read one at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from flamingo_ft.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if not (self.folder / INDEX).is_file():
            raise UserError(f"{self.folder}: found no {SINGLE}; give a model in the safetensors format")
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        return [self.folder / name for name in sorted(set(index["weight_map"].values()))]
