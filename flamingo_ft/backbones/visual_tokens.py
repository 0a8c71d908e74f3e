"""The visual tokens of a tower: which layer they are read from, and what becomes of its grid of patches.

Shapes: N images, H and W pixels, h and w the grid of tokens, V = h * w tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from flamingo_ft.backbones.compat import ModifiedResNet, TimmModel, VisionTransformer
from flamingo_ft.errors import UserError

SHUFFLE = 2  # pixel shuffle joins SHUFFLE x SHUFFLE neighbouring tokens


@dataclass(frozen=True)
class TokenOptions:
    """How tokens are made from a tower's feature maps.

    layer: index of the block (of convolutional towers, the stage) whose output is taken; negative ones count
        from the end.
    pixel_shuffle: join each 2 x 2 neighbouring tokens into one of four times the width (InternVL,
        arXiv:2404.16821).
    """

    layer: int = -1
    pixel_shuffle: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> TokenOptions:
        """Return the options in a `VisionBackbone.config`."""
        config = config or {}
        return cls(config.get("layer", cls.layer), config.get("pixel_shuffle", cls.pixel_shuffle))

    def record(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, for a `VisionBackbone.config`."""
        return {name: value for name, value in vars(self).items() if value != getattr(DEFAULT_TOKENS, name)}


DEFAULT_TOKENS = TokenOptions()


def token_options(visual: Any) -> TokenOptions:
    """Return the options of a tower: the defaults for one that this package did not build."""
    return getattr(visual, "token_options", DEFAULT_TOKENS)


def image_shape(visual: Any) -> tuple[int, int]:
    """Return the height and width in pixels of the images that a tower takes."""
    size = visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def layer_widths(visual: Any) -> list[int]:
    """Return the width of each layer's output. Raises UserError for anything but an OpenCLIP tower."""
    kind = type(visual)
    if issubclass(kind, VisionTransformer):
        return [visual.transformer.width] * len(visual.transformer.resblocks)
    if issubclass(kind, TimmModel):
        return [layer["num_chs"] for layer in visual.trunk.feature_info]
    if issubclass(kind, ModifiedResNet):
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        return [visual.conv3.out_channels, *(stage[-1].conv3.out_channels for stage in stages)]
    raise UserError(
        f"unknown token width of a {kind.__name__}; pass the tower of an OpenCLIP model, its .visual"
    )


def token_width(visual: Any) -> int:
    """Return D, the width of the spatial tokens. Raises UserError for anything but an OpenCLIP tower."""
    options = token_options(visual)
    width = layer_widths(visual)[options.layer]
    return width * SHUFFLE**2 if options.pixel_shuffle else width


def spatial_tokens(visual: Any, images: Tensor) -> Tensor:
    """Return `spatial_maps` as tokens, row by row: (N, 3, H, W) -> (N, V, D)."""
    return map_to_tokens(spatial_maps(visual, images))


def map_to_tokens(maps: Tensor) -> Tensor:
    """(N, D, h, w) -> (N, h * w, D), row by row."""
    return maps.flatten(2).transpose(1, 2)


def spatial_maps(visual: Any, images: Tensor) -> Tensor:
    """Return a layer's tokens before the final norm, as a grid: (N, 3, H, W) -> (N, D, h, w).

    The layer is the last one unless the tower's `TokenOptions` name another. There is one token per patch:
    class and register tokens are dropped. For convolutional towers, these are the cells of a stage's feature
    map; for CLIP ViTs, those of the last block are OpenFlamingo's tokens. The tower runs in eval mode
    whatever mode it is in, so patch dropout, stochastic depth and batch statistics have no effect, and
    without gradients unless it has trainable LoRA. Images are cast to the dtype of the first convolution.

    Raises UserError for a tower without spatial tokens.
    """
    trunk = getattr(visual, "trunk", visual)
    if not hasattr(visual, "forward_intermediates") or not hasattr(trunk, "forward_intermediates"):
        raise UserError(
            f"vision tower {type(trunk).__name__} has no spatial tokens (no forward_intermediates); "
            "choose an OpenCLIP architecture such as ViT-L-14"
        )
    options = token_options(visual)
    needs_grad = torch.is_grad_enabled() and _has_trainable_lora(visual)
    with torch.set_grad_enabled(needs_grad), _eval_mode(visual):
        outputs = visual.forward_intermediates(
            _to_input_dtype(visual, images),
            indices=[options.layer],
            stop_early=True,
            normalize_intermediates=False,
            intermediates_only=True,
        )
    maps = outputs["image_intermediates"][-1]
    return pixel_unshuffle(maps, SHUFFLE) if options.pixel_shuffle else maps


def modules_after_tokens(visual: Any) -> set[nn.Module]:
    """Return the modules of a tower that `spatial_tokens` does not call: later layers, poolers, heads."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in visual.modules()]
    device = next(visual.parameters()).device
    try:
        spatial_tokens(visual, torch.zeros(1, 3, *image_shape(visual), device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return set(visual.modules()) - called


def _has_trainable_lora(module: nn.Module) -> bool:
    return any(parameter.requires_grad and ".lora_" in name for name, parameter in module.named_parameters())


@contextmanager
def _eval_mode(module: nn.Module) -> Generator[None]:
    """Put every submodule except LoRA's in eval mode, and restore its mode afterwards."""
    training = [part for name, part in module.named_modules() if part.training and ".lora_" not in name]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _to_input_dtype(visual: nn.Module, images: Tensor) -> Tensor:
    for module in visual.modules():
        if isinstance(module, nn.Conv2d):
            return images.to(module.weight.dtype)
    return images
