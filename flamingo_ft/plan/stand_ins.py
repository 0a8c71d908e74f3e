"""Linear layers that occupy and allocate what bitsandbytes' do, for a dry run.

They follow bitsandbytes 0.50.2, bitsandbytes/autograd/_functions.py: a 4-bit layer restores its matrix for the product,
in the forward and again in the backward pass, and keeps nothing in between; an 8-bit layer keeps what it read.
"""

from __future__ import annotations

from collections.abc import Container
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flamingo_ft.backbones.quantization import Quantization

BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # scales that share a scale, with double quantization


def pack_linears(
    module: nn.Module,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    on_cuda: bool,
    skip: Container[str] = (),
) -> None:
    """Replace the linear layers in ``module`` that are not in ``skip``, in place, by stand-ins of their packed size."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and not isinstance(layer, _Packed) and name not in skip:
            if quantization.format == "int8":
                packed = Packed8bit(layer, on_cuda)
            else:
                packed = Packed4bit(layer, quantization.double_quantization, compute_dtype)
            module.set_submodule(name, packed.train(layer.training))


class _Packed(nn.Linear):
    """A frozen linear layer whose matrix is bytes; `nn.Linear`, so that LoRA goes beside it as beside the real one."""

    def __init__(self, layer: nn.Linear, packed: Tensor):
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.source_dtype = layer.weight.dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in)."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=dtype)


class Packed4bit(_Packed):
    """nf4 or fp4: half a byte per weight and a scale per block."""

    def __init__(self, layer: nn.Linear, double_quantization: bool, compute_dtype: torch.dtype):
        count, bytes_like = layer.weight.numel(), layer.weight.new_empty
        super().__init__(layer, bytes_like(ceil(count / 2), 1, dtype=torch.uint8))
        self.compute_dtype = compute_dtype
        self.double_quantization = double_quantization
        blocks = ceil(count / BLOCK)
        self.register_buffer("code", bytes_like(16, dtype=torch.float32), persistent=False)
        if double_quantization:
            self.register_buffer("scales", bytes_like(blocks, dtype=torch.uint8), persistent=False)
            outer = bytes_like(ceil(blocks / SCALES_BLOCK), dtype=torch.float32)
            self.register_buffer("scales_of_scales", outer, persistent=False)
            self.register_buffer("offset", bytes_like((), dtype=torch.float32), persistent=False)
            self.register_buffer("scales_code", bytes_like(256, dtype=torch.float32), persistent=False)
        else:
            self.register_buffer("scales", bytes_like(blocks, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _Product4bit.apply(x.to(self.compute_dtype), bias, self).to(x.dtype)

    def restored(self, dtype: torch.dtype) -> Tensor:
        scales = (
            self.scales.to(torch.float32) if self.double_quantization else self.scales
        )  # alive beside the matrix
        matrix = super().restored(dtype)
        del scales
        return matrix


class Packed8bit(_Packed):
    """int8: a byte per weight and a scale per row."""

    def __init__(self, layer: nn.Linear, on_cuda: bool):
        super().__init__(layer, layer.weight.new_empty(layer.weight.shape, dtype=torch.int8))
        self.on_cuda = on_cuda
        scales = layer.weight.new_empty(layer.out_features, dtype=torch.float32)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product8bit.apply(x, bias, self)


class _Product4bit(torch.autograd.Function):
    """MatMul4Bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Packed4bit) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.restored(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return (
            torch.matmul(gradient, ctx.layer.restored(ctx.layer.source_dtype).to(gradient.dtype)),
            None,
            None,
        )


class _Product8bit(torch.autograd.Function):
    """MatMul8bitLt on CUDA, MatMul8bitFp on a CPU. Columns of outliers are not counted: they are few."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Packed8bit) -> Tensor:
        ctx.layer, ctx.x = layer, x
        product = _rounded_product if layer.on_cuda else _restored_product
        return product(x, bias, layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        matrix = ctx.layer.restored(ctx.x.dtype)
        return torch.matmul(gradient.to(ctx.x.dtype), matrix), None, None


def _restored_product(x: Tensor, bias: Tensor | None, layer: Packed8bit) -> Tensor:
    return functional.linear(x, layer.restored(x.dtype), bias)


def _rounded_product(x: Tensor, bias: Tensor | None, layer: Packed8bit) -> Tensor:
    """Integers times integers: x rounded to int8 by row, the product in int32, then half precision, then x's dtype."""
    rounded = _rounded(x.to(torch.float16))
    product = rounded.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
    return product.to(torch.float16).to(x.dtype)


def _rounded(x: Tensor) -> Tensor:
    outliers = x.abs() >= 0.0
    return outliers.new_empty(x.shape, dtype=torch.int8)
