"""Tokens on disk: one file for each image, found by the image's content.

Shapes: V visual tokens, D width.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

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
