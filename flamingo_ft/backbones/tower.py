"""A vision tower as a module: build it, change its image size and the layer of its tokens, and quantize it.

Shapes: H and W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.compat import (
    PreprocessCfg,
    ResizeKeepRatio,
    ResizeToAPixel,
    TimmModel,
    VisionTransformer,
    image_transform_v2,
    merge_preprocess_dict,
    resize_positional_embedding,
)
from flamingo_ft.backbones.quantization import Quantization, quantize_linears
from flamingo_ft.backbones.timm_tower import TimmTower, build_timm_tower, is_timm
from flamingo_ft.backbones.visual_tokens import (
    DEFAULT_TOKENS,
    SHUFFLE,
    TokenOptions,
    image_shape,
    layer_widths,
    spatial_maps,
)
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message

MAX_ASPECT = 64  # of an image that is resized whole before its centre is cut out
# Raised by torch and timm for an image size that a tower does not support.
UNSUPPORTED_SIZE = (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError)


# --- Building


def build_visual(config: dict) -> nn.Module:
    """Build the tower of a `VisionBackbone.config` with random weights; nothing is downloaded.

    Under `torch.device("meta")` it takes no memory. A state dict then fills every parameter and persistent
    buffer; the others (tables of rotary or relative positions) come from `non_persistent_buffers(config)`.
    """
    visual = build_timm_tower(config) if is_timm(config) else _build_open_clip_tower(config)
    apply_options(visual, config)
    return visual


def apply_options(visual: Any, config: dict) -> None:
    """Give a tower the image size and the `TokenOptions` of its `VisionBackbone.config`, in place."""
    if config.get("image_size"):
        set_image_size(visual, config["image_size"])
    visual.token_options = TokenOptions.of(config)


def _build_open_clip_tower(config: dict) -> nn.Module:
    # The public constructor also builds a text tower: the smallest possible one, discarded at once.
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
    # Otherwise timm downloads ImageNet weights.
    vision_cfg: Any = {**config["vision_cfg"], "timm_model_pretrained": False}
    quick_gelu = config.get("quick_gelu", False)
    return open_clip.CLIP(config["embed_dim"], vision_cfg, text, quick_gelu=quick_gelu).visual


def non_persistent_buffers(config: dict) -> dict[str, Tensor]:
    """Return the buffers of `build_visual(config)` that are not in its state dict, on the CPU, by name.

    Only some timm trunks have any (EVA, PE-Core, Swin); those towers are built once in memory and discarded.
    """
    with torch.device("meta"):
        visual = build_visual(config)
    stored = visual.state_dict().keys()
    names = [name for name, _ in visual.named_buffers() if name not in stored]
    if not names:
        return {}
    with torch.device("cpu"):  # the caller may be in a meta context
        visual = build_visual(config)
    return {name: visual.get_buffer(name) for name in names}


# --- Images


def image_transform(preprocess: dict) -> Callable[[Image.Image], Tensor]:
    """Return OpenCLIP's inference transform for a `VisionBackbone.preprocess`: image -> (3, H, W).

    A side that it would round to 0 pixels, of a very thin image, is 1 pixel.
    """
    fields = PreprocessCfg(**preprocess)
    transform: Any = image_transform_v2(fields, is_train=False)
    first = transform.transforms[0]
    if isinstance(first, ResizeKeepRatio):
        transform.transforms[0] = ResizeToAPixel.replacing(first)
    if fields.resize_mode == "shortest":
        transform.transforms.insert(0, cut_ends)
    return transform


def cut_ends(image: Image.Image) -> Image.Image:
    """Cut the ends off an image that is more than `MAX_ASPECT` times as long as it is wide.

    A transform that resizes the shorter side and keeps the centre cuts them off anyway, but enlarges them
    first: 1 x 60,000 pixels to 224 x 13,440,000.
    """
    # As much from both ends, so that the centre stays where it is.
    left, top = (max(0, side - MAX_ASPECT * min(image.size)) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def to_picture(preprocess: dict, pixels: Tensor) -> Tensor:
    """Undo the normalization of `image_transform`: pixels (..., 3, H, W) -> 8-bit RGB (..., H, W, 3).

    The picture is what the tower sees: resized, cropped or padded.
    """
    fields = PreprocessCfg(**preprocess)
    mean, std = (torch.tensor(values)[:, None, None] for values in (fields.mean, fields.std))
    levels = (pixels.float().cpu() * std + mean) * 255
    return levels.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def tower_preprocess(visual: nn.Module, overrides: dict, resize_mode: str | None = None) -> dict:
    """Return the fields of OpenCLIP's PreprocessCfg: its defaults, ``overrides``, then size and resize mode.

    The size is always the tower's. resize_mode: None for the one that ``overrides`` or OpenCLIP gives.
    """
    fields = merge_preprocess_dict(PreprocessCfg(), overrides)
    fields = merge_preprocess_dict(fields, {"size": visual.image_size, "resize_mode": resize_mode})
    return json.loads(json.dumps(fields))  # tuples become lists, as they will be once stored


def set_image_size(visual: Any, image_size: int) -> None:
    """Make ``visual`` take images of image_size x image_size pixels, in place.

    Position embeddings are interpolated as by OpenCLIP's ``force_image_size``, here for a tower that already
    has its weights or is on the meta device. Convolutional towers take any size. Raises what torch and timm
    raise for a tower that does not support the size.
    """
    if isinstance(visual, TimmModel):
        visual.set_input_size((image_size, image_size))
        return
    if not isinstance(visual, VisionTransformer):
        visual.image_size = image_size
        return
    visual.image_size = (image_size, image_size)
    visual.grid_size = tuple(image_size // side for side in visual.patch_size)
    native = visual.positional_embedding
    embedding = native.detach().to(torch.promote_types(native.dtype, torch.float32))
    resized = resize_positional_embedding(visual, embedding)
    visual.positional_embedding = nn.Parameter(resized, native.requires_grad)


def config_with_options(
    name: str, config: dict, image_size: int | None = None, tokens: TokenOptions = DEFAULT_TOKENS
) -> dict:
    """Return ``config`` with another image size and other tokens, after a trial run on the meta device.

    name: of the tower, for messages. Raises UserError if the tower does not support them.
    """
    config = _with_tokens(name, _at_image_size(name, config, image_size), tokens)
    if tokens.pixel_shuffle:
        _check_even_grid(name, config)
    return config


def _at_image_size(name: str, config: dict, image_size: int | None) -> dict:
    native = config["vision_cfg"].get("image_size", 224)
    if image_size is None or native in (image_size, [image_size, image_size]):
        return config
    resized = {**config, "image_size": image_size}
    try:
        with torch.device("meta"):
            _check_whole_patches(build_visual(config), name, image_size)
            _trial_maps(resized)
    except UNSUPPORTED_SIZE as error:
        raise UserError(
            f"vision tower {name} takes images of {native} pixels and does not support {image_size} "
            f"({error_message(error)}); leave image_size out, or choose a ViT"
        ) from error
    return resized


def _with_tokens(name: str, config: dict, tokens: TokenOptions) -> dict:
    if tokens == DEFAULT_TOKENS:
        return config
    with torch.device("meta"):
        layers = len(layer_widths(build_visual(config)))
    if not -layers <= tokens.layer < layers:
        raise UserError(
            f"vision tower {name} has {layers} layers, got layer {tokens.layer}; "
            f"use {-layers} to -1, counted from the end (-1 is the last), or 0 to {layers - 1}"
        )
    return config | tokens.record()


def _check_even_grid(name: str, config: dict) -> None:
    """Refuse pixel shuffle on a grid of tokens that cannot be divided into 2 x 2 blocks."""
    with torch.device("meta"):
        height, width = _trial_maps(config | {"pixel_shuffle": False}).shape[-2:]
    if height % SHUFFLE or width % SHUFFLE:
        raise UserError(
            f"pixel_shuffle: joins blocks of {SHUFFLE} x {SHUFFLE} tokens, but vision tower {name} has "
            f"{height} x {width}; set image_size so that both are even, or pixel_shuffle to false"
        )


def _trial_maps(config: dict) -> Tensor:
    visual = build_visual(config)
    return spatial_maps(visual, torch.zeros(1, 3, *image_shape(visual)))


def _check_whole_patches(visual: nn.Module, name: str, image_size: int) -> None:
    """Refuse a size at which a ViT would ignore the border of the image."""
    embedding = getattr(visual.trunk, "patch_embed", None) if isinstance(visual, TimmModel) else visual
    patch = getattr(embedding, "patch_size", None)
    if patch is None or image_size % patch[0] == 0:
        return
    below = image_size // patch[0] * patch[0]
    choices = " or ".join(str(size) for size in (below, below + patch[0]) if size)
    raise UserError(
        f"image_size: must be a multiple of the {patch[0]}-pixel patches of vision tower {name}, "
        f"got {image_size}; use {choices}"
    )


# --- Quantization


def quantize_tower(
    visual: nn.Module,
    quantization: Quantization | BitsAndBytesConfig,
    device: torch.device | str | None = None,
    *,
    keep: Callable[[str], bool] = lambda name: False,
) -> None:
    """Unfuse the attention of ``visual``, quantize its linear layers and move it to ``device``, in place.

    The arguments are those of `quantize_linears`. Raises UserError as it does, and for a tower without
    matrices to quantize.
    """
    check_quantizable(visual)
    unfuse_attention(visual)
    # An nn.MultiheadAttention that is still fused reads its matrices without calling its submodules.
    fused = [name for name, module in visual.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = tuple(f"{name}." for name in fused)
    quantize_linears(visual, quantization, device, keep=lambda name: name.startswith(inside) or keep(name))
    if device is not None:
        visual.to(device)


def check_quantizable(visual: Any) -> None:
    """Refuse a tower without linear layers. A head on convolutions does not count: spatial tokens skip it."""
    if isinstance(visual, VisionTransformer):
        return
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        head = None if isinstance(visual, TimmTower) else trunk.get_classifier()
        if any(isinstance(module, nn.Linear) and module is not head for module in trunk.modules()):
            return
    kind = type(getattr(visual, "trunk", visual)).__name__
    raise UserError(
        f"vision tower {kind} has convolutions and no matrices to quantize; set its quantization to none, "
        "or choose a ViT, SigLIP, EVA or ConvNeXt tower"
    )
