"""The recipe's model without content: shapes and number formats of everything that it is made of.

The seam to what builds and prepares the real one (training/build.py): it has to make the same layers in the same number
formats, from the files that come before any weights.
"""

from __future__ import annotations

from collections.abc import Container
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.quantizers.base import get_keys_to_not_convert

from flamingo_ft.adapters import add_lora, set_trainable
from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.language import LanguageBackbone
from flamingo_ft.backbones.quantization import DTYPES, Quantization
from flamingo_ft.backbones.tower import build_visual, check_quantizable, token_width, tower_preprocess
from flamingo_ft.backbones.vision import VisionBackbone
from flamingo_ft.config import LanguageSection, Recipe, VisionSection
from flamingo_ft.config.tables import BRIDGE_PARTS
from flamingo_ft.data.render import apply_template
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo

from .cuda_emulation import Device


def build_meta_model(
    recipe: Recipe,
    tower: dict,
    lm_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """What `build_model` makes of the recipe on ``device``, on the meta device."""
    wanted = recipe.model
    with torch.device("meta"):
        model, processor = build_flamingo(
            meta_vision(tower, wanted.vision, device),
            meta_language(lm_config, tokenizer, wanted.language, device),
            cross_attn_every_n_layers=wanted.cross_attn_every_n_layers,
            media_visibility=wanted.media_visibility,
            perceiver=wanted.perceiver.model_dump(),
            cross_attention=wanted.cross_attention.model_dump(),
            decoder_layers_attr_name=wanted.language.decoder_layers_attr_name,
        )
        apply_template(processor, recipe.data)
        set_trainable(model, recipe.trainable)
        quantize_frozen_bridge(model, recipe, device)
        # What updates start from takes weights to look at, and no memory.
        add_lora(model, recipe.lora.model_copy(update={"init_lora_weights": "default"}))
        set_trainable(model, recipe.trainable, recipe.lora)
    return model, processor


def move_to_fake(model: nn.Module) -> None:
    """Exchange meta tensors for fake CPU ones, which autocast treats as it does real ones; in a FakeTensorMode."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, meta in tensors.items():
                if meta is not None:
                    tensors[name] = fakes.setdefault(id(meta), _fake(meta))


def _fake(meta: Tensor) -> Tensor:
    fake = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    return nn.Parameter(fake, meta.requires_grad) if isinstance(meta, nn.Parameter) else fake


def meta_vision(config: dict, wanted: VisionSection, device: Device) -> VisionBackbone:
    """The tower; OpenCLIP loads it in float32, and what a quantized one keeps is in the compute dtype."""
    visual = build_visual(config).eval().requires_grad_(False)
    quantization = Quantization.of(wanted)
    if quantization:
        check_quantizable(visual)
        unfuse_attention(visual)
        visual.to(compute_dtype(quantization, device))
        replace_linears(visual, quantization, compute_dtype(quantization, device), device == "cuda")
    source = {"name": wanted.name, "pretrained": wanted.pretrained, "revision": None, "sha256": None}
    preprocess = tower_preprocess(visual, {}, wanted.resize_mode)
    return VisionBackbone(visual, config, preprocess, token_width(visual), source)


def meta_language(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, wanted: LanguageSection, device: Device
) -> LanguageBackbone:
    """The language model, in its checkpoint's number format on a GPU and in float32 without one; what a quantized one
    keeps is in the compute dtype."""
    quantization = Quantization.of(wanted)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model.language: {wanted.name} comes quantized, and what its layers take is not planned yet; "
            "plan with the unquantized model and a quantization"
        )
    dtype = (config.dtype or torch.float32) if device == "cuda" else torch.float32
    dtype = compute_dtype(quantization, device) if quantization else dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    if quantization:
        skip = get_keys_to_not_convert(model)
        replace_linears(model, quantization, compute_dtype(quantization, device), device == "cuda", skip)
    source = {"name": wanted.name, "revision": wanted.revision, "sha256": None}
    return LanguageBackbone(model, tokenizer, source)


def quantize_frozen_bridge(model: FlamingoForConditionalGeneration, recipe: Recipe, device: Device) -> None:
    """Quantize the parts of the bridge that stay frozen, where the recipe says so."""
    wanted = recipe.model.bridge_quantization
    if wanted == "none":
        return
    quantization = Quantization(wanted)
    for part in BRIDGE_PARTS:
        if not part.takes_lora:
            continue
        module = model.get_submodule(part.module)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            replace_linears(module, quantization, compute_dtype(quantization, device), device == "cuda")


def compute_dtype(quantization: Quantization, device: Device) -> torch.dtype:
    """The number format that quantized matrices are multiplied in on ``device``."""
    automatic = torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES.get(quantization.compute_dtype, automatic)


BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # scales that share a scale, with double quantization


def replace_linears(
    module: nn.Module,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    on_cuda: bool,
    skip: Container[str] = (),
) -> None:
    """Replace the linear layers in ``module`` that are not in ``skip``, in place, by stand-ins of their packed size."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and not isinstance(layer, _FakeQuantizedLinear) and name not in skip:
            if quantization.format == "int8":
                packed = FakeLinear8bit(layer, on_cuda)
            else:
                packed = FakeLinear4bit(layer, quantization.double_quantization, compute_dtype)
            module.set_submodule(name, packed.train(layer.training))


class _FakeQuantizedLinear(nn.Linear):
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


class FakeLinear4bit(_FakeQuantizedLinear):
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


class FakeLinear8bit(_FakeQuantizedLinear):
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
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FakeLinear4bit) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FakeLinear8bit) -> Tensor:
        ctx.layer, ctx.x = layer, x
        product = _rounded_product if layer.on_cuda else _restored_product
        return product(x, bias, layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        matrix = ctx.layer.restored(ctx.x.dtype)
        return torch.matmul(gradient.to(ctx.x.dtype), matrix), None, None


def _restored_product(x: Tensor, bias: Tensor | None, layer: FakeLinear8bit) -> Tensor:
    return functional.linear(x, layer.restored(x.dtype), bias)


def _rounded_product(x: Tensor, bias: Tensor | None, layer: FakeLinear8bit) -> Tensor:
    """Integers times integers: x rounded to int8 by row, the product in int32, then half precision, then x's dtype."""
    rounded = _rounded(x.to(torch.float16))
    product = rounded.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.int32)
    return product.to(torch.float16).to(x.dtype)


def _rounded(x: Tensor) -> Tensor:
    outliers = x.abs() >= 0.0
    return outliers.new_empty(x.shape, dtype=torch.int8)
