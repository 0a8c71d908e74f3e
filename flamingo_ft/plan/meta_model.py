"""Build the recipe's model on the meta device: the layers and dtypes of training/build.py, without weights.

Quantized layers are stand-ins of the size of bitsandbytes' layers, which allocate what those do.
"""

from __future__ import annotations

from collections.abc import Container
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from flamingo_ft.adapters import add_lora, set_trainable
from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.language import LanguageBackbone
from flamingo_ft.backbones.precision import DTYPES, frozen_dtype
from flamingo_ft.backbones.quantization import Quantization
from flamingo_ft.backbones.tower import build_visual, check_quantizable, tower_preprocess
from flamingo_ft.backbones.vision import VisionBackbone
from flamingo_ft.backbones.visual_tokens import token_width
from flamingo_ft.config import LanguageSection, Recipe, VisionSection
from flamingo_ft.config.tables import BRIDGE_PARTS
from flamingo_ft.data.render import apply_template
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.build import recipe_options, set_media_options

from .compat import get_keys_to_not_convert
from .cuda_emulation import Device
from .precision import autocast_dtype, half_dtype

WEIGHTS_PER_SCALE = 64  # bitsandbytes' 4-bit block size
SCALES_PER_SCALE = 256  # with double quantization


def build_meta_model(
    recipe: Recipe,
    tower: dict,
    lm_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build what `training.build.build_model` builds for a run on ``device``, on the meta device.

    tower: OpenCLIP's configuration of the vision tower.
    """
    config, dtype = recipe.model, frozen_dtype(autocast_dtype(recipe.train.precision, device))
    with torch.device("meta"):
        model, processor = build_flamingo(
            meta_vision(tower, config.vision, device, dtype),
            meta_language(lm_config, tokenizer, config.language, device, dtype),
            **recipe_options(recipe),
        )
        apply_template(processor, recipe.data)
        set_media_options(processor, recipe.data)
        set_trainable(model, recipe.trainable)
        _quantize_frozen_bridge(model, recipe, device)
        # Initializations such as LoftQ read the weights, which a meta model lacks, and take no memory later.
        add_lora(model, recipe.lora.model_copy(update={"init_lora_weights": "default"}))
        set_trainable(model, recipe.trainable, recipe.lora)
    return model, processor


def meta_to_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU ones, which autocast treats like real ones, in a FakeTensorMode.

    Tensors that modules share stay shared.
    """
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, meta in [*parameters, *buffers]:
            if id(meta) not in fakes:
                fakes[id(meta)] = _fake_like(meta)
            setattr(module, name, fakes[id(meta)])


def _fake_like(meta: Tensor) -> Tensor:
    fake = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    return nn.Parameter(fake, meta.requires_grad) if isinstance(meta, nn.Parameter) else fake


def meta_vision(
    tower: dict, config: VisionSection, device: Device, dtype: torch.dtype | None = None
) -> VisionBackbone:
    """Build the tower in ``dtype`` or in float32, as OpenCLIP loads it.

    What is not quantized of a quantized one has the compute dtype.
    """
    visual = build_visual(tower).eval().requires_grad_(False)
    quantization = Quantization.of(config)
    if quantization:
        check_quantizable(visual)
        unfuse_attention(visual)
        visual.to(_compute_dtype(quantization, device))
        quantize_linears(visual, quantization, device)
    elif dtype is not None:
        visual.to(dtype)
    source = {"name": config.name, "pretrained": config.pretrained, "revision": None, "sha256": None}
    preprocess = tower_preprocess(visual, {}, config.resize_mode)
    return VisionBackbone(visual, tower, preprocess, token_width(visual), source)


def meta_language(
    lm_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: LanguageSection,
    device: Device,
    dtype: torch.dtype | None,
) -> LanguageBackbone:
    """Build the language model in ``dtype``, or in its checkpoint's on a GPU and in float32 on a CPU.

    A quantized one keeps the rest in its compute dtype. Raises UserError for a checkpoint that is quantized
    already.
    """
    if getattr(lm_config, "quantization_config", None) is not None:
        raise UserError(
            f"model.language: {config.name} is a quantized checkpoint, whose memory cannot be planned yet; "
            "plan with the unquantized model and model.language.quantization"
        )
    quantization = Quantization.of(config)
    if quantization:
        dtype = _compute_dtype(quantization, device)
    elif dtype is None:
        dtype = _stored_dtype(lm_config) if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(lm_config, dtype=dtype).eval().requires_grad_(False)
    if quantization:
        quantize_linears(model, quantization, device, skip=get_keys_to_not_convert(model))
    source = {"name": config.name, "revision": config.revision, "sha256": None}
    return LanguageBackbone(model, tokenizer, source)


def _stored_dtype(lm_config: PreTrainedConfig) -> torch.dtype:
    stored = lm_config.dtype or torch.float32
    return stored if isinstance(stored, torch.dtype) else getattr(torch, stored)


def _quantize_frozen_bridge(model: FlamingoForConditionalGeneration, recipe: Recipe, device: Device) -> None:
    """Quantize the frozen parts of the bridge if model.bridge_quantization says so."""
    if recipe.model.bridge_quantization == "none":
        return
    quantization = Quantization(recipe.model.bridge_quantization)
    for part in BRIDGE_PARTS:
        if not part.takes_lora:  # no matrices to quantize
            continue
        module = model.get_submodule(part.module)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            quantize_linears(module, quantization, device)


def _compute_dtype(quantization: Quantization, device: Device) -> torch.dtype:
    """Return the dtype that quantized matrices are multiplied in."""
    automatic = half_dtype(device) or torch.float32
    return DTYPES.get(quantization.compute_dtype, automatic)


# --- stand-ins for quantized layers ---
#
# They follow bitsandbytes 0.50.2, bitsandbytes/autograd/_functions.py: a 4-bit layer dequantizes its matrix
# in the forward and again in the backward pass, keeping nothing in between; an 8-bit one saves its input.


def quantize_linears(
    module: nn.Module, quantization: Quantization, device: Device, skip: Container[str] = ()
) -> None:
    """Replace the linear layers in ``module`` by stand-ins of their quantized size, except ``skip``."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and not isinstance(layer, _QuantizedLinear) and name not in skip:
            if quantization.format == "int8":
                stand_in = Linear8bit(layer, on_cuda=device == "cuda")
            else:
                compute_dtype = _compute_dtype(quantization, device)
                stand_in = Linear4bit(layer, quantization.double_quantization, compute_dtype)
            module.set_submodule(name, stand_in.train(layer.training))


class _QuantizedLinear(nn.Linear):
    """A frozen linear layer with a matrix of bytes; PEFT adds LoRA to it as to any `nn.Linear`."""

    def __init__(self, layer: nn.Linear, quantized: Tensor):
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.source_dtype = layer.weight.dtype
        self.weight = nn.Parameter(quantized, requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)
        self.register_parameter("bias", bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (out, in)."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=dtype)


class Linear4bit(_QuantizedLinear):
    """nf4 or fp4: half a byte per weight, and a scale per block."""

    def __init__(self, layer: nn.Linear, double_quantization: bool, compute_dtype: torch.dtype):
        count, new = layer.weight.numel(), layer.weight.new_empty
        super().__init__(layer, new(ceil(count / 2), 1, dtype=torch.uint8))
        self.compute_dtype = compute_dtype
        self.double_quantization = double_quantization
        blocks = ceil(count / WEIGHTS_PER_SCALE)
        buffers = {"code": new(16, dtype=torch.float32)}
        if double_quantization:
            buffers |= {
                "scales": new(blocks, dtype=torch.uint8),
                "scales_of_scales": new(ceil(blocks / SCALES_PER_SCALE), dtype=torch.float32),
                "offset": new((), dtype=torch.float32),
                "scales_code": new(256, dtype=torch.float32),
            }
        else:
            buffers["scales"] = new(blocks, dtype=torch.float32)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _Product4bit.apply(input.to(self.compute_dtype), bias, self).to(input.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        # The dequantized scales are alive beside the matrix.
        scales = self.scales.to(torch.float32) if self.double_quantization else self.scales
        matrix = super().dequantize(dtype)
        del scales
        return matrix


class Linear8bit(_QuantizedLinear):
    """int8: a byte per weight, and a scale per row."""

    def __init__(self, layer: nn.Linear, on_cuda: bool):
        super().__init__(layer, layer.weight.new_empty(layer.weight.shape, dtype=torch.int8))
        self.on_cuda = on_cuda
        scales = layer.weight.new_empty(layer.out_features, dtype=torch.float32)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return _Product8bit.apply(input, bias, self)


class _Product4bit(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (gradient,) = gradients
        matrix = ctx.layer.dequantize(ctx.layer.source_dtype).to(gradient.dtype)
        return torch.matmul(gradient, matrix), None, None


class _Product8bit(torch.autograd.Function):
    """bitsandbytes' MatMul8bitLt on CUDA, MatMul8bitFp on a CPU. Outlier columns are few and not counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear8bit) -> Tensor:
        ctx.layer, ctx.x = layer, x
        if layer.on_cuda:
            return _int8_product(x, layer.out_features)
        return functional.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        (gradient,) = gradients
        matrix = ctx.layer.dequantize(ctx.x.dtype)
        return torch.matmul(gradient.to(ctx.x.dtype), matrix), None, None


def _int8_product(x: Tensor, out_features: int) -> Tensor:
    """Allocate as the int8 product does: x as int8, the product in int32, then float16, then x's dtype."""
    rounded = _round_rows(x.to(torch.float16))
    product = rounded.new_empty(*x.shape[:-1], out_features, dtype=torch.int32)
    return product.to(torch.float16).to(x.dtype)


def _round_rows(x: Tensor) -> Tensor:
    outliers = x.abs() >= 0.0  # the mask of outliers is alive beside the result
    return outliers.new_empty(x.shape, dtype=torch.int8)
