"""The keys of a recipe, their types, defaults and meaning.

Values are strict (no text where a number is wanted) and frozen; a key that is not declared here is an error. All values
that contradict each other are reported, so that no recipe is quietly run as something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flamingo_ft.config.data import DataSection, contradictions_of_data
from flamingo_ft.config.section import (
    ComputeDtype,
    Count,
    LanguageName,
    Names,
    QuantizationFormat,
    Section,
    StartPath,
    TowerName,
    WeightsName,
)
from flamingo_ft.config.train import EvalSection, TrainSection, contradictions_of_training

CONTRADICTION = "contradiction"  # the kind of an error between values; `found` in its context has location and reason of each


class VisionSection(Section):
    """The frozen vision tower, from OpenCLIP."""

    name: TowerName
    """`nano`, an OpenCLIP architecture, `hf-hub:org/name`, or a folder in OpenCLIP's local-dir format: one that holds
    open_clip_config.json. A folder is relative to the recipe file, in an override to the current directory; `./` before it
    makes it a folder in any case."""
    pretrained: WeightsName | None = None
    """OpenCLIP's tag of the weights, or their file, relative to the recipe file, in an override to the current directory.
    null: the name's own; random for an architecture."""
    image_size: Count | None = None
    """Height and width in pixels that images are brought to; the tower's position embeddings are interpolated. null:
    the tower's own."""
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """How: the shorter side fits and the rest is cropped, the longer one fits and the rest is padded, or both are made
    to fit. null: the tower's own."""
    quantization: QuantizationFormat = "none"
    """How the tower's matrices are kept in memory: as loaded, or through bitsandbytes in 8 (int8) or 4 bits (nf4, fp4)."""
    double_quantization: bool = True
    """Quantize the scales of 4-bit blocks too: 0.37 bits less per weight (QLoRA, arXiv:2305.14314, section 3)."""
    compute_dtype: ComputeDtype = "auto"
    """Number format that quantized matrices are multiplied in. auto: bf16 or fp16, what the GPU has; fp32 without one."""


class LanguageSection(Section):
    """The frozen language model, any causal LM of transformers."""

    name: LanguageName
    """`nano`, a name on the Hugging Face Hub, or a folder that holds config.json, relative to the recipe file, in an
    override to the current directory. `./` before it makes it a folder in any case, a revision one on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null: the default branch, whose commit is recorded."""
    quantization: QuantizationFormat = "none"
    """How the language model's matrices are kept in memory: as loaded, or through bitsandbytes in 8 (int8) or 4 bits (nf4, fp4)."""
    double_quantization: bool = True
    """Quantize the scales of 4-bit blocks too: 0.37 bits less per weight (QLoRA, arXiv:2305.14314, section 3)."""
    compute_dtype: ComputeDtype = "auto"
    """Number format that quantized matrices are multiplied in. auto: bf16 or fp16, what the GPU has; fp32 without one."""
    decoder_layers_attr_name: str | None = None
    """Dotted path of the list of decoder layers, for a language model where it is not found by itself."""


class PerceiverSection(Section):
    """The perceiver resampler: from any number of patch tokens to a fixed number of latents per image."""

    num_latents: Count = 64
    """Latents per image or video."""
    depth: Count = 6
    """Number of attention + feed-forward layers."""
    heads: Count = 8
    """Attention heads."""
    dim_head: Count = 64
    """Width of one attention head."""
    ff_mult: Count = 4
    """Width of the feed-forward layer, as a multiple of the tower's width."""
    max_num_media: Count | None = None
    """Images per sample for which a position is learned. null: no position of the image is learned."""
    max_num_frames: Count | None = None
    """Frames per video for which a position is learned. null: no position of the frame is learned."""


class CrossAttentionSection(Section):
    """The gated cross-attention blocks, from text tokens to latents."""

    heads: Count = 8
    """Attention heads."""
    dim_head: Count = 64
    """Width of one attention head."""
    ff_mult: Count = 4
    """Width of the feed-forward layer, as a multiple of the language model's width."""


class ModelSection(Section):
    """Both backbones and the bridge between them."""

    vision: VisionSection
    """The frozen vision tower."""
    language: LanguageSection
    """The frozen language model."""
    cross_attn_every_n_layers: Count = 1
    """One cross-attention block before every n-th decoder layer."""
    media_visibility: Literal["immediate", "all_preceding", "following"] = "immediate"
    """Images a text token sees: the last before it, all before it, or the next after it (OpenFlamingo v1)."""
    init_from: StartPath | None = None
    """An adapter's folder, a merged model's, or an OpenFlamingo checkpoint to start from, relative to the recipe file, in an
    override (and in a packaged recipe) to the current directory; or org/name[@revision] on the Hub. null: a fresh
    bridge."""
    bridge_quantization: QuantizationFormat = "none"
    """How the matrices of the bridge's parts that stay frozen are kept in memory."""
    perceiver: PerceiverSection = PerceiverSection()
    """Shape of the perceiver resampler."""
    cross_attention: CrossAttentionSection = CrossAttentionSection()
    """Shape of the gated cross-attention blocks."""


class TrainableSection(Section):
    """The parts that learn; the backbones never do."""

    perceiver: bool = True
    """Train the perceiver resampler."""
    cross_attention: bool = True
    """Train the gated cross-attention blocks."""
    new_tokens: bool = True
    """Train the embedding rows of the tokens that were added to the language model."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the trained weights. auto: fp32."""


class LoraPart(Section):
    """LoRA (arXiv:2106.09685) on one part of the model."""

    r: Count = 16
    """Rank of the update."""
    lora_alpha: Count = 32
    """The update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    target_modules: Names = ("all-linear",)
    """Matrices that get an update: all-linear, or the names they end in (q_proj, layers.0.mlp.up_proj)."""


class LoraSection(Section):
    """LoRA on each part, or null; what is not said of a part holds for all."""

    language: LoraPart | None = None
    """LoRA on the language model."""
    cross_attention: LoraPart | None = None
    """LoRA on the cross-attention blocks."""
    perceiver: LoraPart | None = None
    """LoRA on the perceiver resampler."""
    vision: LoraPart | None = None
    """LoRA on the vision tower."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on what goes into an update."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA, arXiv:2402.09353)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "loftq", "eva"] = "default"
    """What updates start from. pissa (arXiv:2404.02948) wants unquantized matrices, loftq (arXiv:2310.08659) 4-bit ones;
    eva (arXiv:2410.07170) looks at the first training batches."""

    @property
    def parts(self) -> dict[str, LoraPart]:
        """The parts that get LoRA, by name."""
        named = {name: getattr(self, name) for name in ("language", "cross_attention", "perceiver", "vision")}
        return {name: part for name, part in named.items() if part is not None}


class Recipe(Section):
    """A run: which backbones, which bridge, what trains, on what, how, and how it is judged."""

    model: ModelSection
    """Both backbones and the bridge between them."""
    trainable: TrainableSection = TrainableSection()
    """The parts that learn."""
    lora: LoraSection = LoraSection()
    """LoRA on each part."""
    data: DataSection
    """Training and held-out samples."""
    train: TrainSection
    """How training goes."""
    eval: EvalSection = EvalSection()
    """How the held-out samples are judged."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if found := list(contradictions(self)):
            reasons = "; ".join(f"{'.'.join(map(str, location))}: {reason}" for location, reason in found)
            raise PydanticCustomError(CONTRADICTION, "{reasons}", {"found": found, "reasons": reasons})
        return self


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Location and message of what no single value is to blame for."""
    trained = [part for part in ("perceiver", "cross_attention", "new_tokens") if getattr(recipe.trainable, part)]
    for part in recipe.lora.parts:
        if part in trained:
            reason = f"trainable.{part} is true too; a part trains whole or through LoRA: set one to false or null"
            yield ("lora", part), reason
    if not (trained or recipe.lora.parts):
        yield ("trainable",), "nothing would train; set one part to true, or give one LoRA"
    if recipe.model.bridge_quantization != "none" and recipe.model.init_from is None:
        reason = "a fresh bridge has nothing worth freezing; use none, or name a model.init_from"
        yield ("model", "bridge_quantization"), reason
    elif recipe.model.bridge_quantization != "none" and {"perceiver", "cross_attention"} <= set(trained):
        yield ("model", "bridge_quantization"), "all of the bridge trains, and what trains cannot be quantized; use none"
    yield from contradictions_of_data(recipe)
    yield from contradictions_of_training(recipe)
