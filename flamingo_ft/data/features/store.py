"""What tokens on disk depend on besides the image: another of these, and another folder.

Tokens on disk: one file for each image, found by the image's content.

Shapes: V visual tokens, D width.


Adding to the tokens on disk, within a budget, beside other processes that do the same.
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
from torch import Tensor

from flamingo_ft import atomic
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.images import READER_VERSION
from flamingo_ft.version import __version__

FORMAT = 1  # raised when the same pixels are to become other tokens
# Whose code turns files into pixels and pixels into tokens. One that is not installed is not used.
PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "bitsandbytes", "pillow", "av", "torchcodec")


def features_key(
    model: FlamingoForConditionalGeneration, preprocess: Mapping[str, Any], **how: Any
) -> dict[str, Any]:
    """The tower as it is, the transform, the software, and ``how`` it is run: JSON-able, for `folder_name`.

    The digest is of the tower's tensors as they stand in memory, so it also tells apart what quantization, another
    number format or a merge made of the same files. It takes some seconds for a tower of a GB.
    """
    source = (model.config.backbones or {}).get("vision") or {}
    return {
        "format": FORMAT,
        "reader": READER_VERSION,
        "tower": source.get("name"),
        "tower_sha256": tensors_sha256(model.vision_encoder),
        "architecture": model.config.vision_config,
        "quantization": source.get("quantization"),
        "preprocess": dict(preprocess),
        "device": model.device.type,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **how,
        "versions": {"flamingo_ft": __version__, **{name: _installed(name) for name in PACKAGES}},
    }


def folder_name(key: Mapping[str, Any]) -> str:
    """A name that keys share only when they are equal."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


TOKENS = "tokens"


@dataclass(frozen=True)
class FeatureStore:
    """The files of one tower, transform and number format; all have ``shape`` (V, D) and ``dtype``.

    Reads only, holds nothing open and is picklable: made for the workers that prepare batches.
    """

    folder: Path
    shape: tuple[int, int]
    dtype: torch.dtype

    @staticmethod
    def key_of(content: bytes, frame: int | None = None) -> str:
        """What an image is kept under: a digest of its file's content, and of a video the number of the frame in it."""
        digest = hashlib.blake2b(content, digest_size=32).hexdigest()
        return digest if frame is None else f"{digest}-{frame}"

    def get(self, key: str) -> Tensor | None:
        """The tokens (V, D), memory-mapped; None where there is no such file, or one that is damaged."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                about, tokens = file.metadata() or {}, file.get_tensor(TOKENS)
        except (OSError, SafetensorError):
            return None
        fits = tuple(tokens.shape) == self.shape and tokens.dtype == self.dtype
        return tokens if fits and about == _about(key, tokens) else None

    def path(self, key: str) -> Path:
        """Where the tokens are; 256 folders, since some file systems are slow with a million files in one."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def content(self, key: str, tokens: Tensor) -> bytes:
        """The file for tokens (V, D) of the store's dtype, on the CPU."""
        return save({TOKENS: tokens.contiguous()}, _about(key, tokens))


def _about(key: str, tokens: Tensor) -> dict[str, str]:
    """What a file says of itself. The checksum tells a file whose pages never reached the disk from a whole one."""
    return {"key": key, "crc32": f"{zlib.crc32(tokens.contiguous().view(torch.uint8).numpy()):08x}"}


PARTIAL = "partial"  # folder of files that are being written
ABANDONED_S = 3600.0  # a file that has been written for longer was left behind by a run that was killed


class FeatureWriter:
    """Adds tokens to ``store`` until the files under ``root`` have ``max_bytes`` together; nothing is ever removed.

    Files are counted once, at the beginning, and as they are added. Each of ``writers`` processes that share the folder
    takes an equal part of what is left then. Where the disk is full or read-only, adding ends with one warning, and
    training goes on: the tokens only save time.
    """

    def __init__(self, store: FeatureStore, root: Path, max_bytes: int | None = None, writers: int = 1):
        self.store = store
        self.left = None if max_bytes is None else max(0, max_bytes - bytes_under(root)) // writers
        self.is_open = self.left != 0
        self._partial = store.folder / PARTIAL
        _remove_abandoned(self._partial)

    def add(self, key: str, tokens: Tensor) -> None:
        """Keep tokens (V, D), unless they are there already or there is no room."""
        if not self.is_open or self.store.get(key) is not None:
            return
        content = self.store.content(key, tokens.detach().cpu())
        if self.left is not None and len(content) > self.left:
            self.is_open = False
            return
        try:
            self._write(self.store.path(key), content)
        except OSError as error:
            self._give_up(error)
            return
        if self.left is not None:
            self.left -= len(content)

    def _write(self, path: Path, content: bytes) -> None:
        for folder in (self._partial, path.parent):
            folder.mkdir(exist_ok=True)
        atomic.write_shared(path, content, self._partial)

    def _give_up(self, error: OSError) -> None:
        self.is_open = False
        warnings.warn(
            f"data.cache.folder: {self.store.folder}: nothing is added any more ({error.strerror}); "
            "what is there is used, other images are encoded each time",
            stacklevel=3,
        )


def bytes_under(folder: Path) -> int:
    """What the files below a folder have together; files that go away meanwhile do not count."""
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
            if time.time() - file.stat().st_mtime > ABANDONED_S:
                file.unlink()
        except FileNotFoundError:
            continue
