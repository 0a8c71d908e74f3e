"""Content hashes: how an adapter knows the backbones it was trained on.

`tensors_sha256` reads loaded tensors, `files_sha256` a folder on disk (a local one, or a snapshot in the
Hugging Face cache). Neither looks at paths, dates or anything else in which two copies of a model may differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import (
    BACKBONE_WEIGHTS,
    CONFIG_FILE,
    OPEN_CLIP_CONFIG_FILE,
    WEIGHT_SUFFIXES,
    shard_names,
)

CONFIG_FILES = (CONFIG_FILE, OPEN_CLIP_CONFIG_FILE)


# The first complete set is the vocabulary; downloads differ in which of the others they bring along.
VOCABULARY_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tensors_sha256(tensors: nn.Module | Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, in the order of the names.

    A module is read through its `state_dict`; non-persistent buffers follow from the configuration and do not
    count. The device does not matter, the dtype does. Raises ValueError for a tensor on the meta device.
    """
    named = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach()
        if tensor.is_meta:
            raise ValueError(f"tensor {name} is on the meta device and has no content to hash")
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def files_sha256(folder: str | Path) -> str:
    """Digest of the files that decide what a model computes: configuration, weights and tokenizer.

    Of several formats of the weights (or of the vocabulary) only the one that is loaded counts, so a full
    download and a minimal one agree. Only the folder itself is read, not `.git`, `.cache` or other folders
    below it, and no generation settings, chat templates, code or documents. Each file counts by its name and
    its SHA-256. For a large file in the Hugging Face cache that is the name of the blob it links to, and
    nothing is read.

    Raises UserError when the folder does not exist or holds no weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, so there is no model to identify; check the path")
    weights = _weight_files(folder)
    if not weights:
        raise UserError(f"{folder} holds no weights (*.safetensors or *.bin); download the model again")
    digest = hashlib.sha256()
    for file in sorted({*_existing(folder, CONFIG_FILES), *weights, *_tokenizer_files(folder)}):
        digest.update(f"{file.name}\0{_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _existing(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _weight_files(folder: Path) -> list[Path]:
    """The weights a loader would take: one file, the shards of an index, or all that look like weights."""
    preferred = _existing(folder, BACKBONE_WEIGHTS)
    if not preferred:
        return [file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    if preferred[0].suffix != ".json":
        return preferred[:1]
    shards = shard_names(preferred[0])
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{preferred[0]} names {missing[0]}, which is not there; download the model again")
    return [folder / name for name in shards]


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any(len(_existing(folder, files)) == len(files) for files in VOCABULARY_FILES)


def _tokenizer_files(folder: Path) -> list[Path]:
    complete = (files for files in VOCABULARY_FILES if len(_existing(folder, files)) == len(files))
    return _existing(folder, next(complete, ()) + TOKENIZER_FILES)


def _file_sha256(file: Path) -> str:
    """SHA-256 of one file, read off the name of its blob where the Hugging Face cache already knows it.

    The cache stores large files as `blobs/<sha256>`, and small ones under a git hash of 40 digits, which is
    another digest and not used.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
