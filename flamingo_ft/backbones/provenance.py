"""What identifies a backbone: content hashes of its tensors or files, and the license on its model card.

An adapter records the hash of the backbones it was trained on. Neither hash depends on paths, dates or
anything else that may differ between two copies of a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import hf_hub_download, metadata_load
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

# The first complete set is the vocabulary; downloads differ in which of the others they include.
VOCABULARY_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MODEL_CARD = "README.md"
LICENSE_TIMEOUT = 5.0  # seconds to wait for the Hub: a license is not worth a longer delay


# --- Content hashes


def tensors_sha256(tensors: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in the order of the names.

    A module is hashed by its `state_dict`: non-persistent buffers, which follow from the configuration, do
    not count. The dtype counts, the device does not. Raises ValueError for a tensor on the meta device.
    """
    named = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach()
        if tensor.is_meta:
            raise ValueError(f"tensor {name} is on the meta device and has no content to hash")
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(header.encode() + b"\n")
        content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def files_sha256(folder: str | Path) -> str:
    """Return the SHA-256 of a model's files: configuration, weights and tokenizer.

    folder: a local one, or a snapshot in the Hugging Face cache. If it holds the weights (or the vocabulary)
    in several formats, only the one that is loaded counts, so a full download and a minimal one agree.
    Subfolders, generation settings, chat templates, code and documents do not count. Each file is hashed as
    its name and its SHA-256, which for a large file in the cache is the name of the blob it links to, without
    reading the file.

    Raises UserError if the folder does not exist or holds no weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; check the path of the model")
    weights = _weight_files(folder)
    if not weights:
        raise UserError(f"{folder}: no weights (*.safetensors or *.bin); download the model again")
    digest = hashlib.sha256()
    for file in sorted({*_existing(folder, CONFIG_FILES), *weights, *_tokenizer_files(folder)}):
        digest.update(f"{file.name}\0{_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's vocabulary."""
    return bool(_vocabulary_files(folder))


def _existing(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that a loader reads: one file, the shards of an index, or all of them."""
    preferred = _existing(folder, BACKBONE_WEIGHTS)
    if not preferred:
        return [file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES and file.is_file()]
    if preferred[0].suffix != ".json":
        return preferred[:1]
    shards = shard_names(preferred[0])
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{preferred[0]}: lists {missing[0]}, which does not exist; download the model again")
    return [folder / name for name in shards]


def _vocabulary_files(folder: Path) -> list[Path]:
    for names in VOCABULARY_FILES:
        files = _existing(folder, names)
        if len(files) == len(names):
            return files
    return []


def _tokenizer_files(folder: Path) -> list[Path]:
    return _vocabulary_files(folder) + _existing(folder, TOKENIZER_FILES)


def _file_sha256(file: Path) -> str:
    """Return a file's SHA-256, from the name of its blob if the Hugging Face cache knows it.

    The cache stores large files as `blobs/<sha256>`, and small ones under a git hash of 40 digits, which is
    another hash and is not used.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# --- License


def license_in(folder: Path) -> str | None:
    """Return the license stated on the model card in ``folder``; None if there is no card or it states none.

    For a license of the authors' own, its name or else its link.
    """
    try:
        metadata = metadata_load(folder / MODEL_CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one that the Hub could not read either
        return None
    license = metadata.get("license")
    if license == "other":
        return metadata.get("license_name") or metadata.get("license_link") or "other"
    return ", ".join(map(str, license)) if isinstance(license, list) else license


def license_on_hub(repository: str, revision: str | None) -> str | None:
    """Return the license stated on the card of a Hub repository; downloads the card unless it is cached."""
    try:
        card = hf_hub_download(repository, MODEL_CARD, revision=revision, etag_timeout=LICENSE_TIMEOUT)
    except (OSError, ValueError):  # no such file, no network, or offline mode
        return None
    return license_in(Path(card).parent)
