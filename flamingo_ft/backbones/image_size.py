"""Vision towers at an image size that they were not made for: position embeddings interpolated to other patches.

What open_clip does for ``force_image_size``, on a tower that has its weights already, or is on the meta device.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from flamingo_ft.errors import UserError

POSITIONS = "visual.positional_embedding"


def set_image_size(visual: nn.Module, image_size: int) -> None:
    """Let ``visual`` take images of image_size pixels in height and width, in place.

    Towers of convolutions take any size. Raises what torch and timm raise for a tower that cannot.
    """
    if isinstance(visual, VisionTransformer):
        _interpolate_positions(visual, image_size)
    elif isinstance(visual, TimmModel):
        visual.set_input_size((image_size, image_size))
    else:
        visual.image_size = image_size


def refuse_part_of_a_patch(visual: nn.Module, name: str, image_size: int) -> None:
    """The patches of a ViT would leave out the image's border. Raises UserError, telling the sizes around."""
    embedding = getattr(visual.trunk, "patch_embed", None) if isinstance(visual, TimmModel) else visual
    patch = getattr(embedding, "patch_size", None)
    if patch is None or image_size % patch[0] == 0:
        return
    below = image_size // patch[0] * patch[0]
    around = " or ".join(str(size) for size in (below, below + patch[0]) if size)
    raise UserError(
        f"image_size: found {image_size}, vision tower {name} wants a multiple of its patches' {patch[0]} pixels; "
        f"use {around}"
    )


def _interpolate_positions(visual: VisionTransformer, image_size: int) -> None:
    known = visual.positional_embedding
    visual.image_size = (image_size, image_size)
    visual.grid_size = tuple(image_size // side for side in visual.patch_size)
    tensors = {POSITIONS: known.detach().to(torch.promote_types(known.dtype, torch.float32))}
    resize_pos_embed(tensors, SimpleNamespace(visual=visual))
    visual.positional_embedding = nn.Parameter(tensors[POSITIONS], known.requires_grad)
