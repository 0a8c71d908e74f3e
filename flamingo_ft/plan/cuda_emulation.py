"""What a training step does differently on a GPU, imitated on fake CPU tensors.

A dry run has to work where there is no GPU, so its tensors say they are on a CPU. On CUDA autocast keeps other
operators in float32, attention is one fused operator, and TRL's loss runs kernels of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from trl.kernels import chunked_logprob

Device = Literal["cuda", "cpu"]
HALF = (torch.float16, torch.bfloat16)

# torch/include/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE: those that models run.
FLOAT32_UNDER_AUTOCAST = {
    "exp",
    "log",
    "log1p",
    "reciprocal",
    "rsqrt",
    "pow",
    "__pow__",
    "softplus",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "prod",
    "sum",
    "norm",
    "logsumexp",
}
PROMOTED_ON_CPU_ALONE = "index_copy"


class CudaFloat32Ops(TorchFunctionMode):
    """CUDA's float32 operators under CPU autocast, which has fewer of them, and an operator of its own to promote."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in FLOAT32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(_float(value) for value in args)
            kwargs = {name: _float(value) for name, value in kwargs.items()}
        if getattr(function, "__name__", "") == PROMOTED_ON_CPU_ALONE:
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def recompute_context(device: Device) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What checkpointing is to forward and to recompute in: the engine leaves function modes behind."""
    return nullcontext(), CudaFloat32Ops() if device == "cuda" else nullcontext()


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


@contextmanager
def emulate_device(device: Device) -> Iterator[None]:
    """Autocast, attention and TRL's loss as they allocate on ``device``."""
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(CudaFloat32Ops())
            stack.enter_context(_replaced(functional, scaled_dot_product_attention=fused_attention))
            stack.enter_context(_replaced(chunked_logprob, **_LOSS_KERNELS))
        yield


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as CUDA does it: FlashAttention where it can, else the memory-efficient kernel."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if attn_mask is None and query.dtype in HALF and query.shape[-1] <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(
        query, key, value, _bias(attn_mask, query, key), True, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as numbers to add, its rows padded to a multiple of 16, seen by every head."""
    if mask is None:
        return None
    columns = key.shape[-2]
    padded = query.new_empty(*mask.shape[:-1], -(-columns // 16) * 16)
    return padded[..., :columns].expand(*query.shape[:-1], columns)


class _NoKernel:
    """Stands where a Triton kernel is launched; they write in place."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


_LOSS_KERNELS = {
    "_use_triton": lambda device: True,
    "_forward_kernel": _NoKernel(),
    "_backward_kernel": _NoKernel(),
    "_addmm_fp32": lambda total, left, right: None,  # one cuBLAS product that adds in float32
    "triton": SimpleNamespace(cdiv=lambda count, block: -(-count // block)),  # not installed everywhere
}


@contextmanager
def _replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Attributes of a module, exchanged inside the block."""
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(names)
    try:
        yield
    finally:
        for name in names.keys() - before.keys():
            del vars(module)[name]
        vars(module).update(before)
