"""A Flamingo sharded over several devices with torch's FSDP2 (`fully_shard`).

Each decoder layer, each gated cross-attention block and the perceiver resampler is a unit, gathered when it
runs. The rest, vision tower included, is one unit: a process whose batch has no image does not run the tower,
and would not take part in gathering its blocks one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from flamingo_ft.backbones.decoder_layers import find_decoder_layers

from .core import FlamingoCore


def shard(model: FlamingoCore, **options: Any) -> FlamingoCore:
    """Shard ``model`` in place over all processes, or over the ``mesh`` among the options of `fully_shard`.

    Parameters whose dtype differs from most of their unit (float32 gates beside bfloat16 matrices) are
    replicated, and their gradients averaged. Build the optimizer afterwards, with ``foreach=False`` if some
    are replicated. Every process has to call `forward` and `generate` equally often, and `generate` with the
    same prompts.
    """
    _, layers = find_decoder_layers(model.lang_encoder, model.decoder_layers_attr_name)
    blocks = [block for block in model.gated_cross_attn_layers if block is not None]
    for unit in (*layers, *blocks):
        fully_shard(unit, ignored_params=_replicated(unit), **options)
    # It is called once per number of frames in a batch; it stays gathered, so that all processes gather it
    # equally often.
    fully_shard(
        model.perceiver, reshard_after_forward=False, ignored_params=_replicated(model.perceiver), **options
    )
    units = {parameter for unit in (*layers, *blocks, model.perceiver) for parameter in unit.parameters()}
    fully_shard(model, ignored_params=_replicated(model, units), **options)
    register_fsdp_forward_method(model, "generate")
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model is sharded, so that its forward waits for those of other processes."""
    return isinstance(model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor with all its values. If it is sharded, every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Free gathered weights that a forward has left on a sharded model.

    Values written into them would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Copy ``values``, complete in every process, into a tensor, or into this process's shard of it."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(
            values.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements
        )
    tensor.copy_(values)


def _replicated(unit: nn.Module, others: AbstractSet[nn.Parameter] = frozenset()) -> set[nn.Parameter]:
    """Return the parameters of a unit, without ``others``, whose dtype differs from most of it."""
    sizes: Counter = Counter()
    own = [parameter for parameter in unit.parameters() if parameter not in others]
    for parameter in own:
        sizes[parameter.dtype] += parameter.numel()
    common = max(sizes, key=sizes.__getitem__, default=None)
    apart = {parameter for parameter in own if parameter.dtype != common}
    for parameter in apart:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    return apart


def _average(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None  # called after it was accumulated
    torch.distributed.all_reduce(parameter.grad, op=torch.distributed.ReduceOp.SUM)
    parameter.grad /= torch.distributed.get_world_size()
