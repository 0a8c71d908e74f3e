"""Keep frozen matrices in 8 or 4 bits with bitsandbytes.

int8 is LLM.int8() (arXiv:2208.07339): one scale per row, activations rounded too, outlier columns apart. nf4
and fp4 are QLoRA's 4-bit formats (arXiv:2305.14314): one scale per block of 64 weights, kept in 8 bits by
double quantization.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Conv1D

from flamingo_ft.backbones.precision import DTYPES, half_dtype
from flamingo_ft.errors import UserError

OUTLIER_THRESHOLD = 6.0  # LLM.int8(), section 3.2: activations beyond it are not rounded


@cache
def bitsandbytes() -> Any:
    """Import bitsandbytes; None if it is not installed, in which case all that is not quantized works.

    Only what quantizes asks for it: it takes a second to import, most of it for torch's compiler.
    """
    with suppress(ImportError):
        import bitsandbytes as package  # imports its `functional` itself

        return package
    return None


def _imported() -> Any:
    """Return bitsandbytes if anything has imported it: without it, no layer is quantized."""
    return sys.modules.get("bitsandbytes")


@cache
def _linear_8bit() -> type:
    """Return the class of 8-bit layers."""

    base: Any = bitsandbytes().nn.Linear8bitLt

    class Linear8bit(base):
        """8-bit layer for inputs (..., D); that of bitsandbytes fails on (N, H, W, D), as in ConvNeXt."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return Linear8bit


class QuantizedSection(Protocol):
    """The keys of a recipe's section that configure a backbone's quantization."""

    @property
    def quantization(self) -> Literal["none", "int8", "nf4", "fp4"]: ...

    @property
    def double_quantization(self) -> bool: ...

    @property
    def compute_dtype(self) -> Literal["auto", "fp32", "bf16", "fp16"]: ...


@dataclass(frozen=True)
class Quantization:
    """The format of frozen matrices, and the dtype they are multiplied in.

    double_quantization: keep the scales of 4-bit blocks in 8 bits.
    compute_dtype: auto is `half_dtype`, or float32 if there is none.
    shardable: store the bytes of 4-bit matrices as values of the compute dtype, which FSDP can shard. The
        dequantized weights are the same, so adapters do not record it.
    """

    format: Literal["int8", "nf4", "fp4"]
    double_quantization: bool = True
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    shardable: bool = False

    @classmethod
    def of(cls, section: QuantizedSection, shardable: bool = False) -> Quantization | None:
        """Return the quantization that a section of a recipe asks for; None for unquantized."""
        if section.quantization == "none":
            return None
        return cls(section.quantization, section.double_quantization, section.compute_dtype, shardable)

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> Quantization | None:
        """Invert `record`."""
        return cls(**record) if record else None

    def record(self) -> dict[str, Any]:
        """Return the fields that an adapter's configuration records."""
        return {name: value for name, value in asdict(self).items() if name != "shardable"}

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype on this machine."""
        if self.compute_dtype != "auto":
            return DTYPES[self.compute_dtype]
        return half_dtype() or torch.float32

    def computing_in(self, dtype: torch.dtype) -> Quantization:
        """Return this quantization with ``dtype`` in place of an automatic compute dtype."""
        if self.compute_dtype != "auto":
            return self
        (name,) = (name for name, known in DTYPES.items() if known == dtype)
        return replace(self, compute_dtype=cast(Any, name))

    def bnb_config(self) -> BitsAndBytesConfig:
        """Return the configuration for transformers. Raises UserError if bitsandbytes is not installed."""
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


def require_bitsandbytes(what: str, instead: str = "none") -> None:
    """Raise UserError if bitsandbytes is not installed.

    what: the option that needs it. instead: the value of that option that does not.
    """
    if bitsandbytes() is None:
        raise UserError(f"{what} needs bitsandbytes; pip install bitsandbytes, or use {instead}")


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose matrix bitsandbytes keeps in 8 or 4 bits."""
    bnb = _imported()
    return bnb is not None and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def quantization_formats(module: nn.Module) -> set[str]:
    """Return the formats, "int8" and "4bit", of the quantized matrices in a module."""
    formats: set[str] = set()
    bnb = _imported()
    if bnb is not None:
        for part in module.modules():
            if isinstance(part, bnb.nn.Linear8bitLt):
                formats.add("int8")
            elif isinstance(part, bnb.nn.Linear4bit):
                formats.add("4bit")
    return formats


# --- Quantizing


def quantize_linears(
    module: nn.Module,
    quantization: Quantization | BitsAndBytesConfig,
    device: torch.device | str | None = None,
    *,
    keep: Callable[[str], bool] = lambda name: False,
) -> None:
    """Quantize every linear layer in ``module``, in place and one by one, moving each to ``device``.

    device: None leaves each where it is. keep: names of layers to leave unquantized.
    Raises UserError for a layer whose dtype the format does not support.
    """
    config = quantization.bnb_config() if isinstance(quantization, Quantization) else quantization
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and not is_quantized(layer) and not keep(name):
            _check_dtype(name, layer, config)
            target = layer.weight.device if device is None else torch.device(device)
            module.set_submodule(name, _quantize(layer, config, target))
    normalize_bnb_layers(module)


def normalize_bnb_layers(module: nn.Module) -> None:
    """Make the quantized layers in ``module`` accept any shape and compute the same on every machine.

    On some CPUs (AVX-512 BF16) bitsandbytes repacks 4-bit matrices for a bfloat16 kernel at the first
    evaluation. After that they can be neither trained through nor read, and results depend on the machine: it
    is switched off. 8-bit layers get the class of `_linear_8bit`. Call it on every module in which
    bitsandbytes or transformers replaced layers.
    """
    bnb = _imported()
    if bnb is None:
        return
    for part in module.modules():
        if isinstance(part, bnb.nn.Linear4bit):
            part.support_avx512bf16_for_cpu = False
        elif type(part) is bnb.nn.Linear8bitLt:
            part.__class__ = _linear_8bit()


def _quantize(layer: nn.Linear, config: BitsAndBytesConfig, device: torch.device) -> nn.Module:
    """Return the layer quantized, on ``device``; bitsandbytes quantizes a weight when it is moved there."""
    bnb, quantized = bitsandbytes(), cast(Any, None)
    if config.load_in_8bit:
        quantized = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            has_fp16_weights=False,
            threshold=config.llm_int8_threshold,
            device="meta",
        )
        weight = layer.weight.data.cpu()  # from another device it would be moved without being quantized
    else:
        quantized = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
            device="meta",
        )
        weight = layer.weight.data.to(config.bnb_4bit_compute_dtype)  # the dtype it will be dequantized to
    options = {name: value for name, value in vars(quantized.weight).items() if name not in ("CB", "SCB")}
    parameter_class: Any = type(quantized.weight)
    quantized.weight = parameter_class(weight, requires_grad=False, **options)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)
    quantized.register_parameter("bias", bias)
    return quantized.to(device).train(layer.training)


def _check_dtype(name: str, layer: nn.Linear, config: BitsAndBytesConfig) -> None:
    if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        target = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
        raise UserError(
            f"layer {name}: weights of {layer.weight.dtype} cannot be quantized to {target}; "
            "load it in float32, bfloat16 or float16, or use none"
        )


# --- Dequantizing, and copies of quantized layers


def cast_in_range(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype``. Raises UserError, naming ``name``, if a finite value becomes infinite.

    float16 ends at 65,504, float32 and bfloat16 at 3.4e38.
    """
    cast = tensor.to(dtype)
    if cast.dtype == torch.float16 and tensor.dtype != torch.float16:
        overflowed = cast.isinf() & tensor.isfinite()
        if overflowed.any():
            largest = float(tensor[overflowed].abs().max())
            raise UserError(
                f"{name}: float16 holds values up to 65,504, got {largest:,.4g}; "
                "use bfloat16 (bf16) or float32 (fp32)"
            )
    return cast


@torch.no_grad()
def dequantized_weight(layer: Any) -> Tensor:
    """Return the matrix (out, in) that a quantized layer multiplies by."""
    bnb, weight = bitsandbytes(), layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales)


def dequantized_linear(layer: Any, dtype: torch.dtype, name: str = "layer") -> nn.Linear | Conv1D:
    """Return the unquantized equivalent of a quantized layer: `nn.Linear`, or GPT-2's `Conv1D`.

    Raises UserError, naming ``name``, for weights beyond the range of ``dtype``.
    """
    matrix = cast_in_range(f"{name}.weight", dequantized_weight(layer), dtype)
    if is_conv1d(layer):
        linear = Conv1D(layer.out_features, layer.in_features)
        matrix = matrix.T.contiguous()
    else:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    linear.register_parameter("bias", None)
    if layer.bias is not None:
        bias = cast_in_range(f"{name}.bias", layer.bias.data, dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def dequantize_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized layer in ``module``, in place and one by one, by its dequantized layer."""
    for name, layer in list(module.named_modules()):
        if is_quantized(layer):
            module.set_submodule(name, dequantized_linear(layer, dtype, name).train(layer.training))


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is, or was quantized from, GPT-2's `Conv1D`, whose matrix is (in, out)."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", nn.Linear) is Conv1D


def shared_quantization_state(module: Any) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy`, with which the copy of a quantized layer shares its scales.

    {} for any other module. Meant for copies that also share the weight.
    """
    if not is_quantized(module):
        return {}
    if isinstance(module, bitsandbytes().nn.Linear4bit):
        return {id(module.quant_state): module.quant_state}
    if module.weight.CB is not None:
        module.init_8bit_state()  # otherwise the first of the two that runs would move the scales to itself
    return {id(module.state): copy.copy(module.state)}
