"""Names of other libraries that are not their public API, each with the reason why it is needed.

An upgrade that moves or removes one of them fails here, by name, when the backbones are imported.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Converts MobileCLIP's keys; `open_clip.load_checkpoint` does it only for a model with both towers.
from open_clip.convert import convert_state_dict

# Finds the weights in a folder as `open_clip.create_model` does, which would also build the model.
from open_clip.factory import _find_checkpoint_in_dir as find_weights_in_folder

# Reads every checkpoint format that OpenCLIP reads, unwrapped and with DDP's prefix removed.
from open_clip.factory import load_state_dict

# Interpolates position embeddings as `open_clip.create_model` does for `force_image_size`.
from open_clip.model import resize_pos_embed

# The classes of OpenCLIP's towers: each has its own attributes for width and image size.
from open_clip.modified_resnet import ModifiedResNet

# Downloads a tag's weights, choosing the file in the repository as `open_clip.create_model` does.
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel

# Build the image transform from a JSON-able configuration; the public API builds it together with a model.
# Its first step, for towers whose images keep their shape, is replaced.
from open_clip.transform import PreprocessCfg, ResizeKeepRatio, image_transform_v2, merge_preprocess_dict

# OpenCLIP's own attention, whose fused projection is a bare parameter and has to become a linear layer.
from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import VisionTransformer

# Reads timm's config.json, in all its versions, as `timm.create_model` does, which also builds the model.
from timm.models._hub import load_model_config_from_path as load_timm_config
from torch import Tensor, nn

# What instructions the processor has; torch 2.6 has no public function for it.
from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported

from flamingo_ft.machine_errors import is_machine_error

__all__ = [
    "ModifiedResNet",
    "OpenClipAttention",
    "PreprocessCfg",
    "ResizeKeepRatio",
    "ResizeToAPixel",
    "TimmModel",
    "VisionTransformer",
    "cpu_has_bf16",
    "download_pretrained_from_hf",
    "find_weights_in_folder",
    "image_transform_v2",
    "load_timm_config",
    "load_visual_state_dict",
    "merge_preprocess_dict",
    "resize_positional_embedding",
    "weight_conversion_errors",
]

VISUAL_PREFIX = "visual."
POSITIONAL_EMBEDDING = "visual.positional_embedding"


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices in hardware: by AMX or AVX-512 BF16."""
    return _is_amx_tile_supported() or _is_avx512_bf16_supported()


class ResizeToAPixel(ResizeKeepRatio):
    """OpenCLIP's resize, but no side becomes 0 pixels: its own raises ValueError for very thin images."""

    @classmethod
    def replacing(cls, resize: ResizeKeepRatio) -> ResizeToAPixel:
        """Return this resize with the settings of OpenCLIP's."""
        return cls(resize.size, resize.longest, resize.interpolation)

    @staticmethod
    def get_params(*arguments: Any, **named: Any) -> list[int]:
        """Return height and width after the resize."""
        return [max(1, side) for side in ResizeKeepRatio.get_params(*arguments, **named)]


def load_visual_state_dict(file: Path, visual: nn.Module) -> dict[str, Tensor]:
    """Load the tower's tensors from a CLIP checkpoint, as `open_clip.load_checkpoint` does for both."""
    model: Any = SimpleNamespace(visual=visual)  # stands in for a CLIP model, of which only this is read
    tensors = convert_state_dict(model, load_state_dict(str(file)))
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(VISUAL_PREFIX)}
    resize_pos_embed(tensors, model)
    return {name.removeprefix(VISUAL_PREFIX): tensor for name, tensor in tensors.items()}


def resize_positional_embedding(visual: VisionTransformer, embedding: Tensor) -> Tensor:
    """Interpolate a position embedding (1 + V, D) to the grid of ``visual``, bicubically as OpenCLIP does."""
    tensors = {POSITIONAL_EMBEDDING: embedding}
    resize_pos_embed(tensors, SimpleNamespace(visual=visual))
    return tensors[POSITIONAL_EMBEDDING]


@contextmanager
def weight_conversion_errors() -> Generator[None]:
    """Raise the machine error (disk full, out of memory) that stopped transformers from converting a weight.

    transformers catches every exception there, logs its traceback as a warning of
    `transformers.modeling_utils`, and raises a RuntimeError without the cause.
    """
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    level, propagate = logger.level, logger.propagate
    if not logger.isEnabledFor(logging.WARNING):  # silenced by a trainer: read the warnings, print none
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    except RuntimeError as error:
        lines = (RuntimeError(line.strip()) for text in logged for line in text.splitlines())
        raise next(filter(is_machine_error, lines), error) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
