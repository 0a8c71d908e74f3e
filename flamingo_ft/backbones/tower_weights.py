"""A tower's weights straight from their file, without random ones in their place and without the text tower.

OpenCLIP builds both towers with random weights and loads the file beside them: three times the tower in memory. Here
the tower is on the meta device, and its tensors become those of the file, mapped into memory where its format allows.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import _find_checkpoint_in_dir, load_state_dict
from open_clip.model import resize_pos_embed
from torch import Tensor, nn
from torch.utils.serialization import config as torch_files

PREFIX = "visual."
NUMPY_SUFFIXES = (
    ".npz",
    ".npy",
)  # big_vision's: OpenCLIP writes these into the tower's own tensors one by one


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a tower in the dtypes that it was built with, each converted when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]):
        self._tensors = tensors
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def weights_file(model: str, weights: str | None) -> Path | None:
    """The file that `open_clip.create_model(model, weights)` would load; None where it holds numpy arrays."""
    found = weights or _find_checkpoint_in_dir(Path(model.removeprefix("local-dir:")))
    return None if found is None or Path(found).suffix in NUMPY_SUFFIXES else Path(found)


def fill_from_file(visual: nn.Module, file: Path) -> StoredTensors:
    """Give ``visual``, which is on the meta device, the tensors in ``file``; returns them in the dtypes it had.

    In the tower itself they keep the file's dtypes, and may be the mapped file until `let_go_of_file`. Raises what
    `open_clip.create_model` raises for a file that does not fit.
    """
    dtypes = {name: tensor.dtype for name, tensor in visual.state_dict().items()}
    visual.load_state_dict(_converted(file, visual), strict=True, assign=True)
    return StoredTensors(visual.state_dict(), dtypes)


def let_go_of_file(visual: nn.Module) -> None:
    """Give ``visual``, quantized by now, copies of what it still reads from its file, which may change or go away."""
    for tensor in (*visual.parameters(), *visual.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _converted(file: Path, visual: nn.Module) -> dict[str, Tensor]:
    """The tower's tensors in ``file``, after the steps of `open_clip.load_checkpoint` that concern the tower."""
    model = SimpleNamespace(visual=visual)
    with torch_files.patch(
        {"load.mmap": zipfile.is_zipfile(file)}
    ):  # torch cannot map files of its older format
        tensors = convert_state_dict(model, load_state_dict(str(file)))
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    resize_pos_embed(tensors, model)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
