"""A tower's weights straight from their file, without random ones in their place and without the text tower.

OpenCLIP builds both towers with random weights and loads the file beside them: three times the tower in memory. Here
the tower is on the meta device, and its tensors become those of the file, mapped into memory where its format allows.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import open_clip
import torch
from open_clip.factory import _find_checkpoint_in_dir
from torch import Tensor, nn
from torch.utils.serialization import config as torch_files

NUMPY_SUFFIXES = (".npz", ".npy")  # big_vision's: OpenCLIP writes these into the tower's own tensors one by one


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


class _TowerAlone(nn.Module):
    """What `open_clip.load_checkpoint` takes for a whole model: it converts all tensors, of which the tower's stay."""

    logit_bias = None

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.zeros((), device="meta"))

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> None:
        prefix = "visual."
        own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        self.visual.load_state_dict(own, strict=strict, assign=True)


def weights_file(model: str, weights: str | None) -> Path | None:
    """The file that `open_clip.create_model(model, weights)` would load; None where it holds numpy arrays."""
    found = weights or _find_checkpoint_in_dir(Path(model.removeprefix("local-dir:")))
    return None if found is None or Path(found).suffix in NUMPY_SUFFIXES else Path(found)


def fill_from_file(visual: nn.Module, file: Path) -> StoredTensors:
    """Give ``visual``, which is on the meta device, the tensors in ``file``; returns them in the dtypes it had.

    In the tower itself they keep the file's dtypes, and those of linear layers may be the mapped file; every other
    tensor is a copy of its own. Raises what `open_clip.create_model` raises for a file that does not fit.
    """
    dtypes = {name: tensor.dtype for name, tensor in visual.state_dict().items()}
    with torch_files.patch({"load.mmap": zipfile.is_zipfile(file)}):  # torch cannot map files of its older format
        open_clip.load_checkpoint(_TowerAlone(visual), str(file))
    matrices = {id(layer.weight) for layer in visual.modules() if isinstance(layer, nn.Linear)}
    for parameter in visual.parameters():
        if id(parameter) not in matrices:
            parameter.data = parameter.data.clone()
    return StoredTensors(visual.state_dict(), dtypes)
