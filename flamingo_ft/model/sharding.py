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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from flamingo_ft.backbones.decoder_layers import find_decoder_layers

from .core import FlamingoCore


def shard(model: FlamingoCore, **options: Any) -> FlamingoCore:
    """Shard ``model`` in place over all processes, or over the ``mesh`` among the options of `fully_shard`.

    Parameters of another number format than most of their unit (gates beside bfloat16 matrices) stay whole in every
    process, and their gradients are averaged. Make the optimizer afterwards, with `foreach` off where some stay whole.
    """
    _, layers = find_decoder_layers(model.lang_encoder, model.decoder_layers_attr_name)
    blocks = [block for block in model.gated_cross_attn_layers if block is not None]
    for unit in (*layers, *blocks):
        fully_shard(unit, ignored_params=_keep_whole(unit), **options)
    # Called once for each number of frames in a batch: it stays gathered, so that processes gather it equally often.
    fully_shard(model.perceiver, reshard_after_forward=False, ignored_params=_keep_whole(model.perceiver), **options)
    units = {parameter for unit in (*layers, *blocks, model.perceiver) for parameter in unit.parameters()}
    fully_shard(model, ignored_params=_keep_whole(model, units), **options)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether its forward waits for those of other processes."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values, gathered from every process where it is sharded; all have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
