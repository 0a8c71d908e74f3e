"""The recipe's model without content: shapes and number formats of everything that it is made of.

The seam to what builds and prepares the real one (training/build.py): it has to make the same layers in the same number
formats, from the files that come before any weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.quantizers.base import get_keys_to_not_convert

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones import language, vision
from flamingo_ft.backbones.quantization import DTYPES, Quantization
from flamingo_ft.config import LanguageSection, LoraSection, Recipe, VisionSection
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo

from .devices import Device
from .stand_ins import pack_linears

BRIDGE = ("perceiver", "gated_cross_attn_layers")


def build_on_meta(
    recipe: Recipe, tower: dict, lm_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, device: Device
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """What `build_model` makes of the recipe on ``device``, on the meta device."""
    wanted = recipe.model
    with torch.device("meta"):
        model, processor = build_flamingo(
            meta_vision(tower, wanted.vision, device, bool(recipe.lora.vision)),
            meta_language(lm_config, tokenizer, wanted.language, device),
            cross_attn_every_n_layers=wanted.cross_attn_every_n_layers,
            media_visibility=wanted.media_visibility,
            perceiver=wanted.perceiver.model_dump(),
            cross_attention=wanted.cross_attention.model_dump(),
            decoder_layers_attr_name=wanted.language.decoder_layers_attr_name,
        )
        set_trainable(model, recipe.trainable)
        pack_frozen_bridge(model, recipe, device)
        add_lora(model, recipe.lora, recipe.trainable.dtype)
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


def tower_config(wanted: VisionSection) -> dict:
    """The tower's architecture; of a Hub repository, its configuration alone is fetched."""
    name = wanted.name
    if name.startswith("hf-hub:"):
        file = vision._download(name.removeprefix("hf-hub:"), vision.CONFIG_FILE, None)
        return vision._tower_config(json.loads(Path(file).read_text(encoding="utf-8"))["model_cfg"])
    return vision._locate(name, None, None).config


def language_files(wanted: LanguageSection) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The language model's configuration and tokenizer, all that is fetched of it."""
    folder = language._folder(wanted.name, wanted.revision, local_files_only=False, weights=False)
    config = language._causal_config(folder, wanted.name, trust_remote_code=False)
    return config, language._load(AutoTokenizer, folder, wanted.name)


def meta_vision(config: dict, wanted: VisionSection, device: Device, has_lora: bool) -> vision.VisionBackbone:
    """The tower; OpenCLIP loads it in float32."""
    visual = vision.build_visual(config).eval().requires_grad_(False)
    quantization = Quantization.of(wanted)
    if quantization or has_lora:
        _open_attention(visual)
    if quantization:
        pack_linears(visual, quantization, compute_dtype(quantization, device), device == "cuda")
    source = {"name": wanted.name, "pretrained": wanted.pretrained, "revision": None, "sha256": None}
    preprocess = vision._preprocess(visual, {})
    return vision.VisionBackbone(visual, config, preprocess, vision.token_width(visual), source)


def meta_language(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, wanted: LanguageSection, device: Device
) -> language.LanguageBackbone:
    """The language model, in its checkpoint's number format on a GPU and in float32 without one."""
    dtype = (config.dtype or torch.float32) if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    quantization = Quantization.of(wanted)
    if quantization:
        skip = get_keys_to_not_convert(model)
        pack_linears(model, quantization, compute_dtype(quantization, device), device == "cuda", skip)
    source = {"name": wanted.name, "revision": wanted.revision, "sha256": None}
    return language.LanguageBackbone(model, tokenizer, source)


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


# Until adapters/lora.py and backbones/attention.py are there: what `add_lora` and `open_attention` come to.

PREFIXES = {
    "language": "lang_encoder.",
    "vision": "vision_encoder.",
    "perceiver": "perceiver.",
    "cross_attention": "gated_cross_attn_layers.",
}


def add_lora(model: FlamingoForConditionalGeneration, lora: LoraSection, dtype: str) -> None:
    """Put LoRA updates beside the matrices of its parts; they train in ``dtype``, what trained before goes on."""
    from peft import LoraConfig, inject_adapter_in_model

    if not lora.parts:
        return
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    targets = {part: _targets(model, PREFIXES[part], wanted.target_modules) for part, wanted in lora.parts.items()}
    ranks = {name: lora.parts[part].r for part, names in targets.items() for name in names}
    options = {"use_dora": lora.use_dora, "use_rslora": lora.use_rslora, "lora_dropout": lora.lora_dropout}
    config = LoraConfig(target_modules=list(ranks), rank_pattern={f"^{n}$": r for n, r in ranks.items()}, **options)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        is_update = ".lora_" in name
        parameter.requires_grad_(is_update or id(parameter) in trained)
        if is_update:
            parameter.data = parameter.data.to(torch.bfloat16 if dtype == "bf16" else torch.float32)


def _targets(model: FlamingoForConditionalGeneration, prefix: str, wanted: tuple[str, ...]) -> list[str]:
    head = model.lang_encoder.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear) and module is not head
    ]
    return [name for name in linear if "all-linear" in wanted or any(name.endswith(f".{end}") for end in wanted)]


def _open_attention(visual: nn.Module) -> None:
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            visual.set_submodule(name, _OpenAttention(module))


class _OpenAttention(nn.Module):
    """Self-attention with its projections as linear layers."""

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        self.heads = fused.num_heads
        self.in_proj = nn.Linear(fused.embed_dim, 3 * fused.embed_dim, dtype=fused.in_proj_weight.dtype)
        self.out_proj = nn.Linear(fused.embed_dim, fused.embed_dim, dtype=fused.in_proj_weight.dtype)
        self.requires_grad_(False)

    def forward(self, query: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: object) -> tuple[Tensor, None]:
        parts = self.in_proj(query).chunk(3, dim=-1)
        heads = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        attended = functional.scaled_dot_product_attention(*heads, attn_mask=attn_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None
