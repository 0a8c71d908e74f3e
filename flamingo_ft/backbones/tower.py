"""A vision tower as a module: built from its configuration, and from images to spatial tokens.

Shapes: N images, H and W pixels, V spatial tokens (patches), D token width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from flamingo_ft.backbones.image_size import refuse_part_of_a_patch, set_image_size
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message

# What torch and timm raise for images of a size that a tower is not made for.
UNSIZEABLE = (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError)


def build_visual(config: dict) -> nn.Module:
    """Build the tower of a `VisionBackbone.config` with random weights; nothing is downloaded.

    Under `torch.device("meta")` it costs no memory. A state dict then fills every parameter and persistent
    buffer; the rest (tables of rotary or relative positions) comes from `non_persistent_buffers(config)`.
    """
    # The public constructor wants a text tower too: the smallest one, dropped at once.
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
    vision_cfg = {**config["vision_cfg"], "timm_model_pretrained": False}  # else ImageNet weights are fetched
    quick_gelu = config.get("quick_gelu", False)
    visual = open_clip.CLIP(config["embed_dim"], vision_cfg, text, quick_gelu=quick_gelu).visual
    if config.get("image_size"):
        set_image_size(visual, config["image_size"])
    return visual


def at_size(name: str, config: dict, image_size: int | None) -> dict:
    """``config`` with another image size, after a try on the meta device. UserError where the tower cannot take it."""
    native = config["vision_cfg"].get("image_size", 224)
    if image_size is None or native in (image_size, [image_size, image_size]):
        return config
    sized = {**config, "image_size": image_size}
    try:
        with torch.device("meta"):
            refuse_part_of_a_patch(build_visual(config), name, image_size)
            spatial_tokens(build_visual(sized), torch.zeros(1, 3, image_size, image_size))
    except UNSIZEABLE as error:
        raise UserError(
            f"vision tower {name} is made for images of {native} pixels and cannot take {image_size} "
            f"({error_message(error)}); leave image_size out, or choose a ViT"
        ) from error
    return sized


def non_persistent_buffers(config: dict) -> dict[str, Tensor]:
    """The buffers of `build_visual(config)` that its state dict leaves out, on CPU, by name; {} for most.

    Only some timm trunks have any (EVA, PE-Core, Swin). Those towers are built once in memory and dropped.
    """
    with torch.device("meta"):
        names = _unstored_buffers(build_visual(config))
    if not names:
        return {}
    with torch.device("cpu"):  # the caller may be inside a meta context
        visual = build_visual(config)
    return {name: visual.get_buffer(name) for name in names}


def spatial_tokens(visual: nn.Module, images: Tensor) -> Tensor:
    """Tokens of the last block, one per patch, before the tower's final norm: (N, 3, H, W) -> (N, V, D).

    Class and register tokens are dropped; the maps of convolutional towers become tokens row by row. For CLIP
    ViTs these are the tokens OpenFlamingo saw. The tower is frozen, and in eval mode whatever mode it is in, so
    patch dropout, stochastic depth and batch statistics play no part; there is a gradient only where LoRA was put
    into it and trains. Images are cast to the dtype of its first convolution.

    Raises UserError when the tower has no spatial tokens.
    """
    trunk = getattr(visual, "trunk", visual)
    if not hasattr(visual, "forward_intermediates") or not hasattr(trunk, "forward_intermediates"):
        raise UserError(
            f"vision tower {type(trunk).__name__} has no spatial tokens (no forward_intermediates); "
            "choose an OpenCLIP architecture such as ViT-L-14"
        )
    with torch.set_grad_enabled(torch.is_grad_enabled() and _has_trained_lora(visual)), _eval_mode(visual):
        outputs = visual.forward_intermediates(
            _as_input(visual, images), indices=1, normalize_intermediates=False, intermediates_only=True
        )
    return outputs["image_intermediates"][-1].flatten(2).transpose(1, 2)


def layers_after_tokens(visual: nn.Module) -> set[nn.Module]:
    """The modules of a tower that `spatial_tokens` does not call: poolers and heads."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in visual.modules()]
    size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else (visual.image_size,) * 2
    try:
        spatial_tokens(visual, torch.zeros(1, 3, *size, device=next(visual.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return set(visual.modules()) - called


def token_width(visual: nn.Module) -> int:
    """D, the width of the tower's spatial tokens. Raises UserError for what is no OpenCLIP tower."""
    if isinstance(visual, VisionTransformer):
        return visual.transformer.width
    if isinstance(visual, TimmModel):
        return visual.trunk.feature_info[-1]["num_chs"]
    if isinstance(visual, ModifiedResNet):
        return visual.layer4[-1].conv3.out_channels
    raise UserError(
        f"the token width of a {type(visual).__name__} is not known; pass an OpenCLIP tower (model.visual)"
    )


def image_transform(preprocess: dict) -> Callable[[Image.Image], Tensor]:
    """OpenCLIP's inference transform for a `VisionBackbone.preprocess`: image -> (3, H, W), normalised."""
    return image_transform_v2(PreprocessCfg(**preprocess), is_train=False)


def tower_preprocess(visual: nn.Module, overrides: dict, resize_mode: str | None = None) -> dict:
    """OpenCLIP's rule: its defaults, then the overrides, then always the tower's image size; and what is wished for."""
    wanted = {"size": visual.image_size, "resize_mode": resize_mode}
    fields = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), overrides), wanted)
    return json.loads(json.dumps(fields))  # tuples become lists, as they will be once stored


def _has_trained_lora(module: nn.Module) -> bool:
    return any(parameter.requires_grad and ".lora_" in name for name, parameter in module.named_parameters())


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule but LoRA's own in eval mode, and back in its own mode afterwards."""
    training = [part for name, part in module.named_modules() if part.training and ".lora_" not in name]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _unstored_buffers(visual: nn.Module) -> list[str]:
    stored = visual.state_dict().keys()
    return [name for name, _ in visual.named_buffers() if name not in stored]


def _as_input(visual: nn.Module, images: Tensor) -> Tensor:
    convolutions = (module for module in visual.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return images if first is None else images.to(first.weight.dtype)
