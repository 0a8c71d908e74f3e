"""The feature cache on disk: its key, reading (`FeatureStore`) and writing (`FeatureWriter`).

There is one folder per key - tower, transform, software - and in it one file per image, found by the image's
content.

Shapes: V visual tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flamingo_ft import atomic
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.model.images import READER_VERSION
from flamingo_ft.version import __version__

FORMAT = 1  # bump when this package turns the same pixels into other tokens
# Packages that turn files into pixels and pixels into tokens, if installed.
PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "bitsandbytes", "pillow", "av", "torchcodec")
TOKENS = "tokens"  # name of the tensor in a file
PARTIAL = "partial"  # folder of files that are being written
ABANDONED_SECONDS = 3600.0  # an incomplete file that is older was left behind by a killed run


def features_key(
    visual: nn.Module,
    source: Mapping[str, Any],
    architecture: Mapping[str, Any] | None,
    preprocess: Mapping[str, Any],
    **how: Any,
) -> dict[str, Any]:
    """Return what tokens depend on besides the image, as JSON: tower, transform, software, ``how`` it is run.

    The digest is of the tower's tensors in memory, so that quantization, another dtype or a merge of the same
    files gives another key. It takes some seconds for a tower of 1 GB.

    source, architecture: `VisionBackbone.source` and `VisionBackbone.config`.
    """
    return {
        "format": FORMAT,
        "reader": READER_VERSION,
        "tower": source.get("name"),
        "tower_sha256": tensors_sha256(visual),
        "architecture": architecture,
        "quantization": source.get("quantization"),
        "preprocess": dict(preprocess),
        "device": next(visual.parameters()).device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **how,
        "versions": {"flamingo_ft": __version__, **{name: _installed(name) for name in PACKAGES}},
    }


def cache_folder(name: str) -> Path:
    """Return the user's folder for one kind of cached data, in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flamingo_ft" / name


def folder_name(key: Mapping[str, Any]) -> str:
    """Return a digest of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class FeatureStore:
    """Reads the cached tokens of one key; all have ``shape`` (V, D) and ``dtype``.

    It holds no file open and is picklable, for the workers that prepare batches.
    """

    folder: Path
    shape: tuple[int, int]
    dtype: torch.dtype

    @staticmethod
    def key_of(content: bytes, frame: int | str | None = None) -> str:
        """Return the key of an image: the digest of its file.

        frame: number of a video's frame, or name of a view of a tiled image (`Tiling.view_names`).
        """
        digest = hashlib.blake2b(content, digest_size=32).hexdigest()
        return digest if frame is None else f"{digest}-{frame}"

    def get(self, key: str) -> Tensor | None:
        """Return the tokens (V, D), memory-mapped; None if there is no such file, or it is damaged."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                metadata, tokens = file.metadata() or {}, file.get_tensor(TOKENS)
        except (OSError, SafetensorError):
            return None
        fits = tuple(tokens.shape) == self.shape and tokens.dtype == self.dtype
        return tokens if fits and metadata == _metadata(key, tokens) else None

    def path(self, key: str) -> Path:
        """Return the file of a key, in one of 256 folders: some file systems are slow with large folders."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def content(self, key: str, tokens: Tensor) -> bytes:
        """Return the content of the file for tokens (V, D) of the store's dtype, on the CPU."""
        return save({TOKENS: tokens.contiguous()}, _metadata(key, tokens))


def _metadata(key: str, tokens: Tensor) -> dict[str, str]:
    """Return a file's metadata. The checksum detects a file whose pages never reached the disk."""
    # A buffer, which numpy declares from Python 3.12 on.
    array: Any = tokens.contiguous().view(torch.uint8).numpy()
    return {"key": key, "crc32": f"{zlib.crc32(array):08x}"}


class FeatureWriter:
    """Adds tokens to ``store`` until the files under ``root`` total ``max_bytes``; nothing is ever removed.

    Sizes are measured once, at the start, and counted as files are added. Each of ``writers`` processes that
    share the folder gets an equal part of what is left. If the disk is full or read-only, adding stops with
    one warning and training continues: the cache only saves time.
    """

    def __init__(self, store: FeatureStore, root: Path, max_bytes: int | None = None, writers: int = 1):
        self.store = store
        self.left = None if max_bytes is None else max(0, max_bytes - bytes_under(root)) // writers
        self.is_open = self.left != 0
        self._partial = store.folder / PARTIAL
        _remove_abandoned(self._partial)

    def add(self, key: str, tokens: Tensor) -> None:
        """Store tokens (V, D), unless they are stored already or there is no room."""
        if not self.is_open or self.store.get(key) is not None:
            return
        content = self.store.content(key, tokens.detach().cpu())
        if self.left is not None and len(content) > self.left:
            self.is_open = False
            return
        try:
            self._write(self.store.path(key), content)
        except OSError as error:
            self._stop(error)
            return
        if self.left is not None:
            self.left -= len(content)

    def _write(self, path: Path, content: bytes) -> None:
        for folder in (self._partial, path.parent):
            folder.mkdir(exist_ok=True)
        atomic.write_shared(path, content, self._partial)

    def _stop(self, error: OSError) -> None:
        self.is_open = False
        warnings.warn(
            f"data.cache.folder: {self.store.folder}: cannot be written ({error.strerror}); "
            "what is there is used, other images are encoded each time",
            stacklevel=3,
        )


def bytes_under(folder: Path) -> int:
    """Return the total size of the files in a folder; files that disappear meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _remove_abandoned(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        return
    for file in folder.iterdir():
        try:
            if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                file.unlink()
        except FileNotFoundError:
            continue
