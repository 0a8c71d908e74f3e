"""A model divided over several devices by PyTorch's `fully_shard` (FSDP2).

Units are gathered when they are called, so they have to be called equally often on every device. Decoder layers and
cross-attention blocks are: once a forward, for plain text too. How often the tower and the perceiver run depends on the
batch (no image, videos of several lengths, stored tokens), so they belong to the root, which is gathered once a forward.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from flamingo_ft.backbones.decoder_layers import find_decoder_layers
from flamingo_ft.errors import UserError

from .core import FlamingoCore


def units(model: FlamingoCore) -> list[nn.Module]:
    """The modules that are gathered one at a time; all else is with the root."""
    _, layers = find_decoder_layers(model.lang_encoder, model.decoder_layers_attr_name)
    return [*layers, *(block for block in model.gated_cross_attn_layers if block is not None)]


def unit_classes(model: FlamingoCore) -> list[str]:
    """The names of the units' classes, by which accelerate finds them."""
    return sorted({type(unit).__name__ for unit in units(model)})


def shard(model: FlamingoCore, mesh: DeviceMesh) -> None:
    """Divide ``model`` in place over ``mesh``; before an optimizer is made, for parameters become others.

    Raises UserError where a unit trains in several number formats, whose gradients cannot travel together.
    """
    for part in [*units(model), model]:
        _check_one_dtype(part)
    for part in [*units(model), model]:
        fully_shard(part, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether its forward waits for those of other devices."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all that lies on other devices, which all have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check_one_dtype(part: nn.Module) -> None:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in part.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise UserError(
            f"trainable.dtype: {type(part).__name__} trains in {' and '.join(sorted(dtypes))} (gates stay in float32), "
            "and a sharded one in one format alone; use fp32"
        )
