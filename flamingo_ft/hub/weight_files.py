"""Files that hold a model's weights: names, index files that list shards, and a reader by tensor."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message

if TYPE_CHECKING:
    from torch import Tensor  # the command line reads names of files before it needs torch

CONFIG_FILE = "config.json"
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"

# An adapter, as PEFT names its files.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# A whole model, as transformers names its files; in shards it has an index file beside them.
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PYTORCH_FILE = "pytorch_model.bin"
PYTORCH_INDEX = "pytorch_model.bin.index.json"
PYTORCH_FILENAME_PATTERN = "pytorch_model{suffix}.bin"  # huggingface_hub fills in -00001-of-00002 or nothing
INDEX_FILES = (SAFETENSORS_INDEX, PYTORCH_INDEX)
MODEL_SAFETENSORS = "model*.safetensors"
MODEL_WEIGHTS = (MODEL_SAFETENSORS, "pytorch_model*.bin")

# A vision tower, as open_clip names its files.
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"

# What open_clip and transformers load where a folder holds several, in their order of preference.
BACKBONE_WEIGHTS = (
    OPEN_CLIP_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    PYTORCH_FILE,
    PYTORCH_INDEX,
)

# Checkpoints of OpenFlamingo and Otter: as transformers names them, or as their training scripts do.
TRAINING_CHECKPOINTS = ("final_weights.pt", "checkpoint.pt")
CHECKPOINT_FILES = (SAFETENSORS_FILE, PYTORCH_FILE, *TRAINING_CHECKPOINTS)

# Suffixes and patterns, for files of any name.
TORCH_SUFFIXES = (".bin", ".pt", ".pth")  # what torch.save writes
OPEN_CLIP_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a local-dir
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".gguf")
ANY_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
ANY_INDEX = "*.index.json"
WEIGHT_PATTERNS = (("*.safetensors",), ("*.bin",), ("*.pt", "*.pth"))  # by format, the preferred one first


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (folder / CONFIG_FILE).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def is_whole_model(folder: Path) -> bool:
    """Return whether a folder holds a whole model in the safetensors format, such as a merged one."""
    return (
        (folder / CONFIG_FILE).is_file()
        and not (folder / ADAPTER_WEIGHTS).is_file()
        and any(folder.glob(MODEL_SAFETENSORS))
    )


def shard_names(index: Path) -> list[str]:
    """Return the file names that an index file lists, sorted. Raises UserError if it is damaged."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: not an index of weight files ({error_message(error)}); copy the checkpoint again"
        ) from None


class SafetensorsFolder:
    """The tensors of a model's folder by name, each read from its shard on access.

    Use it in a ``with`` statement, which opens the files. Raises UserError for a folder without safetensors
    files in transformers' format, and for an unknown name.
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
