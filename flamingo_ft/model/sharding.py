"""A Flamingo over several devices, each holding a part of every weight: torch's FSDP2 (`fully_shard`).

Units that are gathered one at a time: each decoder layer, each gated cross-attention block, the perceiver resampler. The
rest, the vision tower with it, is one unit: a process whose batch has no image does not run the tower, and would not
take part in gathering its blocks one by one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from flamingo_ft.backbones.decoder_layers import find_decoder_layers

from .core import FlamingoCore


def shard(model: FlamingoCore, **options: Any) -> FlamingoCore:
    """Shard ``model`` in place over all processes, or over the ``mesh`` among the options of `fully_shard`.

    Parameters of another number format than most of their unit (gates beside bfloat16 matrices) stay whole in every
    process, and their gradients are averaged. Make the optimizer afterwards, with `foreach` off where some stay whole.
    Every process has to call `forward` and `generate` as often as the others, and `generate` with the same prompts.
    """
    _, layers = find_decoder_layers(model.lang_encoder, model.decoder_layers_attr_name)
    blocks = [block for block in model.gated_cross_attn_layers if block is not None]
    for unit in (*layers, *blocks):
        fully_shard(unit, ignored_params=_keep_whole(unit), **options)
    # Called once for each number of frames in a batch: it stays gathered, so that processes gather it equally often.
    fully_shard(
        model.perceiver, reshard_after_forward=False, ignored_params=_keep_whole(model.perceiver), **options
    )
    units = {parameter for unit in (*layers, *blocks, model.perceiver) for parameter in unit.parameters()}
    fully_shard(model, ignored_params=_keep_whole(model, units), **options)
    register_fsdp_forward_method(model, "generate")
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether its forward waits for those of other processes."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values, gathered from every process where it is sharded; all have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_go(model: nn.Module) -> None:
    """Drop what a forward has gathered of a sharded model and keeps: what is written into it would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy ``values``, which every process has whole, into a tensor, or into the part of it that this process holds."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(
            values.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements
        )
    tensor.copy_(values)


def _keep_whole(unit: nn.Module, others: set[nn.Parameter] = frozenset()) -> set[nn.Parameter]:
    """The parameters of a unit, but ``others``, that cannot be in one buffer with most of it."""
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
    torch.distributed.all_reduce(parameter.grad, op=torch.distributed.ReduceOp.SUM)
    parameter.grad /= torch.distributed.get_world_size()
