"""Make a training step on fake CPU tensors allocate what it would allocate on a GPU.

The plan must work on machines without a GPU, so its tensors claim to be on the CPU. On CUDA, autocast keeps
other operators in float32, attention is one fused operator, TRL's loss runs kernels of its own, and saved
activations can be offloaded to host RAM.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flamingo_ft.backbones.cpu_attention import float32_attention_on_cpu

from .compat import efficient_attention, flash_attention, logprob_kernels_as_on_cuda, replaced

Device = Literal["cuda", "cpu"]
HALF = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_DIM = 256
MASK_ALIGNMENT = 16  # elements; the memory-efficient kernel needs the rows of its mask aligned
OFFLOAD_STASH = 5  # activations that trl's OffloadActivations keeps on the GPU while they are copied
MIN_OFFLOADED_BYTES = 1024  # smaller activations are not offloaded

# Operators that CUDA autocast runs in float32 and CPU autocast does not, of those that models use:
# AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE in torch/include/ATen/autocast_mode.h.
CUDA_FLOAT32_OPERATORS = {
    "exp", "log", "log1p", "reciprocal", "rsqrt", "pow", "__pow__", "softplus", "layer_norm", "rms_norm",
    "group_norm", "softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum", "norm", "logsumexp",
}  # fmt: skip
CPU_PROMOTED_OPERATOR = "index_copy"  # CPU autocast promotes its arguments, CUDA autocast does not


class CudaAutocast(TorchFunctionMode):
    """Apply CUDA's autocast rules where CPU autocast is enabled."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in CUDA_FLOAT32_OPERATORS and torch.is_autocast_enabled("cpu"):
            args = tuple(_to_float32(value) for value in args)
            kwargs = {key: _to_float32(value) for key, value in kwargs.items()}
        if name == CPU_PROMOTED_OPERATOR:
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def recompute_contexts(device: Device) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return checkpointing's contexts of the forward pass and of the recomputation.

    Autograd recomputes on a thread without this thread's function modes, so the mode is entered again.
    """
    return nullcontext(), CudaAutocast() if device == "cuda" else nullcontext()


@contextmanager
def emulate_device(device: Device) -> Generator[None]:
    """Let autocast, attention and TRL's loss allocate as on ``device``."""
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(CudaAutocast())
            stack.enter_context(replaced(functional, scaled_dot_product_attention=cuda_attention))
            stack.enter_context(logprob_kernels_as_on_cuda())
        else:
            stack.enter_context(float32_attention_on_cpu())
        yield


def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as on CUDA: FlashAttention, else the memory-efficient kernel."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is None and query.dtype in HALF and query.shape[-1] <= FLASH_MAX_HEAD_DIM:
        return flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    bias = _attention_bias(attn_mask, query, key)
    compute_log_sumexp = True
    return efficient_attention(
        query, key, value, bias, compute_log_sumexp, dropout_p, is_causal, scale=scale
    )[0]


def _attention_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask as an additive bias with aligned rows, expanded to all heads."""
    if mask is None:
        return None
    columns = key.shape[-2]
    aligned = -(-columns // MASK_ALIGNMENT) * MASK_ALIGNMENT
    padded = query.new_empty(*mask.shape[:-1], aligned)
    return padded[..., :columns].expand(*query.shape[:-1], columns)


def activation_offload() -> saved_tensors_hooks:
    """Release saved activations until the backward pass, like trl's OffloadActivations."""
    return saved_tensors_hooks(_Offload(), _restore)


class _Offload:
    """Replace a saved activation by its shape, strides and dtype; the last few stay on the device."""

    def __init__(self) -> None:
        self.stash: list[Tensor] = []

    def __call__(self, saved: Tensor) -> Any:
        if isinstance(saved, torch.nn.Parameter) or saved.nbytes < MIN_OFFLOADED_BYTES:
            return saved
        self.stash = [*self.stash[1 - OFFLOAD_STASH :], saved.detach()]
        return saved.shape, saved.stride(), saved.dtype


def _restore(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    shape, stride, dtype = kept
    return torch.empty_strided(shape, stride, dtype=dtype)
