"""Frozen matrices kept in 8 or 4 bits, through bitsandbytes.

int8 is LLM.int8() (arXiv:2208.07339): a scale per row, activations rounded too, outlier columns apart. nf4 and fp4 are
QLoRA's 4-bit formats (arXiv:2305.14314): a scale per block of 64 weights, which double quantization keeps in 8 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.rounding import rounded
from flamingo_ft.errors import UserError

try:
    import bitsandbytes as bnb
except ImportError:  # without it, all works that is not quantized
    bnb = None

OUTLIER_THRESHOLD = 6.0  # LLM.int8(), section 3.2: activations beyond it are not rounded
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


if bnb is not None:

    class Linear8bit(bnb.nn.Linear8bitLt):
        """An 8-bit layer for x (..., D), as ``nn.Linear``: bitsandbytes' fails on maps (N, H, W, D), as in ConvNeXt."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class QuantizedSection(Protocol):
    """What a recipe says of a backbone's quantization."""

    quantization: Literal["none", "int8", "nf4", "fp4"]
    double_quantization: bool
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Quantization:
    """How frozen matrices are kept: their format, and the number format they are multiplied in.

    double_quantization: keep the scales of 4-bit blocks in 8 bits.
    compute_dtype: auto is bf16 or fp16, what the GPU has, and fp32 without one.
    shardable: keep the bytes of 4-bit matrices as numbers of the compute dtype, which FSDP can share out among processes;
        what they stand for is the same, so no adapter records it.
    """

    format: Literal["int8", "nf4", "fp4"]
    double_quantization: bool = True
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    shardable: bool = False

    @classmethod
    def of(cls, section: QuantizedSection, shardable: bool = False) -> Quantization | None:
        """What a section of a recipe asks for; None for unquantized."""
        if section.quantization == "none":
            return None
        return cls(section.quantization, section.double_quantization, section.compute_dtype, shardable)

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> Quantization | None:
        """The inverse of `record`."""
        return cls(**record) if record else None

    def record(self) -> dict[str, Any]:
        """As an adapter's configuration keeps it."""
        return {name: value for name, value in asdict(self).items() if name != "shardable"}

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype on this machine."""
        if self.compute_dtype != "auto":
            return DTYPES[self.compute_dtype]
        if not torch.cuda.is_available():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def bnb_config(self) -> BitsAndBytesConfig:
        """The same in transformers' words."""
        require_bitsandbytes(f"quantization {self.format}")
        if self.format == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.format,
            bnb_4bit_compute_dtype=self.dtype,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_quant_storage=self.dtype if self.shardable else torch.uint8,
        )


def require_bitsandbytes(wanted: str, instead: str = "none") -> None:
    """Refuse what ``wanted`` names where bitsandbytes is not installed."""
    if bnb is None:
        raise UserError(f"{wanted} needs bitsandbytes; pip install bitsandbytes, or use {instead}")


def is_quantized(module: nn.Module) -> bool:
    """Whether this is one matrix kept in 8 or 4 bits by bitsandbytes."""
    return bnb is not None and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def formats_in(module: nn.Module) -> set[str]:
    """The formats, "int8" and "4bit", of the matrices in a module."""
    if bnb is None:
        return set()
    kinds = {bnb.nn.Linear8bitLt: "int8", bnb.nn.Linear4bit: "4bit"}
    return {name for part in module.modules() for kind, name in kinds.items() if isinstance(part, kind)}


def quantize_linears(
    module: nn.Module,
    quantization: Quantization | BitsAndBytesConfig,
    device: torch.device | str | None = None,
    *,
    keep: Callable[[str], bool] = lambda name: False,
) -> None:
    """Replace every linear layer in ``module``, in place and one by one, moving each to ``device``.

    device: None leaves each where it is.
    keep: the names of layers that stay as they are.
    Raises UserError for a layer whose weights the format cannot take.
    """
    config = quantization.bnb_config() if isinstance(quantization, Quantization) else quantization
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and not is_quantized(layer) and not keep(name):
            _check_fits(name, layer, config)
            target = layer.weight.device if device is None else torch.device(device)
            module.set_submodule(name, _quantized(layer, config, target))
    settle(module)


def settle(module: nn.Module) -> None:
    """Make the quantized matrices in ``module`` answer alike on every machine and for inputs of any shape.

    On some CPUs (AVX-512 BF16) bitsandbytes repacks 4-bit matrices for a kernel in bfloat16 at the first evaluation,
    after which they can be neither trained through nor read, and answers depend on the machine: that is switched off.
    8-bit matrices become `Linear8bit`. To be called on everything that bitsandbytes' layers were put into.
    """
    if bnb is None:
        return
    for part in module.modules():
        if isinstance(part, bnb.nn.Linear4bit):
            part.support_avx512bf16_for_cpu = False
        elif type(part) is bnb.nn.Linear8bitLt:
            part.__class__ = Linear8bit


def shared_state(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: what a quantized matrix keeps beside its bytes, so that a copy with the same weight shares it."""
    if not is_quantized(module):
        return {}
    if isinstance(module, bnb.nn.Linear4bit):
        return {id(module.quant_state): module.quant_state}
    if module.weight.CB is not None:
        module.init_8bit_state()  # else the first of both to run would take the scales for itself
    return {id(module.state): copy.copy(module.state)}


def dequantize_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized layer in ``module``, in place and one by one, by the linear layer that it stands for."""
    for name, layer in list(module.named_modules()):
        if is_quantized(layer):
            module.set_submodule(name, plain_linear(layer, dtype, name).train(layer.training))


def plain_linear(layer: nn.Module, dtype: torch.dtype, name: str = "layer") -> nn.Module:
    """Return the unquantized layer that a quantized one stands for. GPT-2's ``Conv1D``, which transformers quantizes
    too, keeps its matrix as (in, out). Raises UserError, naming ``name``, for weights beyond the range of ``dtype``."""
    matrix = rounded(f"{name}.weight", dequantized(layer), dtype)
    if is_conv1d(layer):
        plain, matrix = Conv1D(layer.out_features, layer.in_features), matrix.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(matrix, requires_grad=False)
    bias = None if layer.bias is None else rounded(f"{name}.bias", layer.bias.data, dtype)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return plain


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer, or the one that was quantized into it, keeps its matrix as (in, out), as GPT-2's do."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", nn.Linear) is Conv1D


@torch.no_grad()
def dequantized(layer: nn.Module) -> Tensor:
    """The matrix (out, in) that a quantized layer stands for."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales)


def _quantized(layer: nn.Linear, config: BitsAndBytesConfig, device: torch.device) -> nn.Linear:
    """The layer with its matrix in the wanted format, on ``device``."""
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    new = _empty8bit(*shape, config) if config.load_in_8bit else _empty4bit(*shape, config)
    kept = {name: value for name, value in new.weight.__dict__.items() if name not in ("CB", "SCB")}
    new.weight = type(new.weight)(_weight(layer, config), requires_grad=False, **kept)
    new.bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)
    return new.to(device).train(layer.training)


def _weight(layer: nn.Linear, config: BitsAndBytesConfig) -> Tensor:
    """The matrix as bitsandbytes is to be given it."""
    weight = layer.weight.data
    if config.load_in_8bit:
        return weight.cpu()  # what comes from anywhere else is moved but not quantized
    return weight.to(config.bnb_4bit_compute_dtype)  # the dtype in which it will be dequantized


def _empty8bit(in_features: int, out_features: int, bias: bool, config: BitsAndBytesConfig) -> nn.Linear:
    options = {"has_fp16_weights": False, "threshold": config.llm_int8_threshold}
    return bnb.nn.Linear8bitLt(in_features, out_features, bias, **options, device="meta")


def _empty4bit(in_features: int, out_features: int, bias: bool, config: BitsAndBytesConfig) -> nn.Linear:
    return bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias,
        compute_dtype=config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
        device="meta",
    )


def _check_fits(name: str, layer: nn.Linear, config: BitsAndBytesConfig) -> None:
    if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        wanted = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
        raise UserError(
            f"layer {name} has weights of {layer.weight.dtype}, which cannot be kept in {wanted}; "
            "load it in float32, bfloat16 or float16, or use none"
        )
