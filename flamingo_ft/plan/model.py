"""The recipe's model without content: shapes and number formats of everything that it is made of.

The seam to what builds and prepares the real one (training/build.py): it has to make the same layers in the same number
formats, from the files that come before any weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.quantizers.base import get_keys_to_not_convert

from flamingo_ft.adapters import add_lora, set_trainable
from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.language import LanguageBackbone
from flamingo_ft.backbones.quantization import DTYPES, Quantization
from flamingo_ft.backbones.tower import check_quantizable
from flamingo_ft.backbones.tower import build_visual, token_width, tower_preprocess
from flamingo_ft.backbones.vision import VisionBackbone
from flamingo_ft.config import LanguageSection, Recipe, VisionSection
from flamingo_ft.data.templates import apply_template
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo

from .devices import Device
from .stand_ins import pack_linears

BRIDGE = ("perceiver", "gated_cross_attn_layers")


def build_on_meta(
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
        pack_frozen_bridge(model, recipe, device)
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
        pack_linears(visual, quantization, compute_dtype(quantization, device), device == "cuda")
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
        pack_linears(model, quantization, compute_dtype(quantization, device), device == "cuda", skip)
    source = {"name": wanted.name, "revision": wanted.revision, "sha256": None}
    return LanguageBackbone(model, tokenizer, source)


def pack_frozen_bridge(model: FlamingoForConditionalGeneration, recipe: Recipe, device: Device) -> None:
    """Quantize the parts of the bridge that stay frozen, where the recipe says so."""
    wanted = recipe.model.bridge_quantization
    if wanted == "none":
        return
    quantization = Quantization(wanted)
    for part in BRIDGE:
        module = model.get_submodule(part)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            pack_linears(module, quantization, compute_dtype(quantization, device), device == "cuda")


def compute_dtype(quantization: Quantization, device: Device) -> torch.dtype:
    """The number format that quantized matrices are multiplied in on ``device``."""
    automatic = torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES.get(quantization.compute_dtype, automatic)
