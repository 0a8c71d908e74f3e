"""Private names of torch, TRL and transformers that the memory plan needs."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

# Tensors with shape, dtype and device but no storage, on which real code runs; torch has no public name for
# them.
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# The documented way to intercept every operator, still under a private module name.
from torch.utils._python_dispatch import TorchDispatchMode

# Which modules of a language model bitsandbytes leaves unquantized: the output head, whatever it is called.
from transformers.quantizers.base import get_keys_to_not_convert
from trl.kernels import chunked_logprob

# Rows of the vocabulary that TRL's fused output head processes at once, which decides its peak.
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as LOGPROB_CHUNK_SIZE

__all__ = [
    "FAKE_TENSOR_LOG",
    "LOGPROB_CHUNK_SIZE",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "efficient_attention",
    "flash_attention",
    "get_keys_to_not_convert",
    "logprob_kernels_as_on_cuda",
    "replaced",
]

FAKE_TENSOR_LOG = logging.getLogger(fake_tensor.__name__)

# The operators that scaled_dot_product_attention chooses from on CUDA, to be run on tensors that claim to be
# on a CPU.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention


class _NoKernel:
    """Stands in for a Triton kernel that writes in place: ``kernel[grid](...)`` does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


# What ChunkedLogProbFunction calls on CUDA, by its name in TRL's module.
_LOGPROB_KERNELS = {
    "_use_triton": lambda device: True,
    "_forward_kernel": _NoKernel(),
    "_backward_kernel": _NoKernel(),
    "_addmm_fp32": lambda total, left, right: None,  # one cuBLAS product that accumulates in float32
}
for _name in _LOGPROB_KERNELS:
    getattr(chunked_logprob, _name)


@contextmanager
def logprob_kernels_as_on_cuda() -> Generator[None]:
    """Let TRL's chunked log-probabilities allocate as on CUDA, where Triton kernels write in place."""
    triton = SimpleNamespace(cdiv=lambda count, block: -(-count // block))  # it may not be installed
    with replaced(chunked_logprob, triton=triton, **_LOGPROB_KERNELS):
        yield


@contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Generator[None]:
    """Replace attributes of a module inside the block."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    try:
        yield
    finally:
        for name in attributes.keys() - before.keys():
            del vars(module)[name]
        vars(module).update(before)
