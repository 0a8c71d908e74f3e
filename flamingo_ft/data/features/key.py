"""What tokens on disk depend on besides the image: another of these, and another folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

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
