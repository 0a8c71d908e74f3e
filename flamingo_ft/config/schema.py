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
    with_keys,
)
from flamingo_ft.config.tables import BRIDGE_PARTS, LORA_PARTS, Part
from flamingo_ft.config.train import EvalSection, TrainSection, contradictions_of_training

CONTRADICTION = "contradiction"  # the kind of an error between values; `found` in its context has location and reason of each


class VisionSection(Section):
    """The frozen vision tower, from OpenCLIP."""

    name: TowerName
    """`nano`, an OpenCLIP architecture, `hf-hub:org/name`, or a folder in OpenCLIP's local-dir format (it holds
    open_clip_config.json). A folder is relative to the recipe file; in an override, to the current directory. Write `./`
    before a folder that has the name of an architecture."""
    pretrained: WeightsName | None = None
    """OpenCLIP's tag for the pretrained weights (such as openai or laion2b_s34b_b79k), or a weights file, relative to the
    recipe file; in an override, to the current directory. null: the weights that come with the name; an architecture name
    alone has none and starts from random weights."""
    image_size: Count | None = None
    """Height and width in pixels that images are resized to; position embeddings are interpolated to match. Larger
    shows finer detail and takes more memory. null: the tower's own size."""
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """How images are resized to a square: shortest fits the shorter side and crops the rest, longest fits the longer
    side and pads the rest, squash changes the aspect ratio. null: as the tower was trained."""
    quantization: QuantizationFormat = "none"
    """Quantization of the tower's weight matrices with bitsandbytes: none, 8 bits (int8) or 4 bits (nf4, fp4). Saves
    memory; nf4 is usually the more accurate 4-bit format."""
    double_quantization: bool = True
    """Quantize the scales of 4-bit blocks too: 0.37 bits less per weight (QLoRA, arXiv:2305.14314, section 3)."""
    compute_dtype: ComputeDtype = "auto"
    """dtype in which quantized matrices are multiplied. auto: bf16 if the GPU supports it, else fp16; fp32 on a
    CPU."""


class LanguageSection(Section):
    """The frozen language model, any causal LM of transformers."""

    name: LanguageName
    """`nano`, a name on the Hugging Face Hub, or a folder that holds config.json. A folder is relative to the recipe file;
    in an override, to the current directory. Write `./` before a folder that has the name of a model on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null: the default branch, whose commit is recorded."""
    quantization: QuantizationFormat = "none"
    """Quantization of the language model's weight matrices with bitsandbytes: none, 8 bits (int8) or 4 bits (nf4,
    fp4). Saves memory; nf4 is usually the more accurate 4-bit format."""
    double_quantization: bool = True
    """Quantize the scales of 4-bit blocks too: 0.37 bits less per weight (QLoRA, arXiv:2305.14314, section 3)."""
    compute_dtype: ComputeDtype = "auto"
    """dtype in which quantized matrices are multiplied. auto: bf16 if the GPU supports it, else fp16; fp32 on a
    CPU."""
    decoder_layers_attr_name: str | None = None
    """Dotted attribute path of the list of decoder layers, such as model.layers. null: found automatically; set it
    only if an error asks for it."""


class PerceiverSection(Section):
    """The perceiver resampler, which turns the patch tokens of an image into a fixed number of latents."""

    num_latents: Count = 64
    """Latents per image or video, which the language model attends to. More keep more detail and cost more time."""
    depth: Count = 6
    """Number of layers, each of attention and feed-forward."""
    heads: Count = 8
    """Attention heads."""
    dim_head: Count = 64
    """Width of one attention head."""
    ff_mult: Count = 4
    """Hidden width of the feed-forward layers, as a multiple of the vision tower's width."""
    max_num_media: Count | None = None
    """Number of images per sample that get a learned position embedding, which tells the first image from the second.
    null: none."""
    max_num_frames: Count | None = None
    """Number of frames per video that get a learned position embedding, which tells the model their order. null:
    none."""


class CrossAttentionSection(Section):
    """The gated cross-attention blocks, through which text tokens attend to image latents."""

    heads: Count = 8
    """Attention heads."""
    dim_head: Count = 64
    """Width of one attention head."""
    ff_mult: Count = 4
    """Hidden width of the feed-forward layers, as a multiple of the language model's width."""


class ModelSection(Section):
    """Both backbones and the bridge between them."""

    vision: VisionSection
    """The frozen vision tower."""
    language: LanguageSection
    """The frozen language model."""
    cross_attn_every_n_layers: Count = 1
    """Insert a gated cross-attention block before every n-th decoder layer. Larger n means fewer parameters, less
    memory and less capacity to use images."""
    media_visibility: Literal["immediate", "all_preceding", "following"] = "immediate"
    """Which images a text token can attend to: the last one before it (immediate, as in Flamingo), all before it
    (all_preceding), or the next one after it (following, as in OpenFlamingo v1)."""
    init_from: StartPath | None = None
    """An adapter's folder, a merged model's, or an OpenFlamingo checkpoint to start from, or org/name[@revision] on the Hub.
    A path is relative to the recipe file; in an override and in a packaged recipe, to the current directory. null: a fresh
    bridge."""
    bridge_quantization: QuantizationFormat = "none"
    """Quantization of the frozen parts of the bridge (perceiver, cross-attention); trainable parts are never
    quantized. Needs init_from."""
    perceiver: PerceiverSection = PerceiverSection()
    """Shape of the perceiver resampler."""
    cross_attention: CrossAttentionSection = CrossAttentionSection()
    """Shape of the gated cross-attention blocks."""


@with_keys(
    {
        part.name: (bool, Field(part.trainable, description=f"Train the {part.label} in full."))
        for part in BRIDGE_PARTS
    }
)
class TrainableSection(Section):
    """Which parts of the bridge are trained in full. The backbones stay frozen; LoRA is configured under lora."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype in which trainable weights are stored. auto: fp32. bf16 halves their memory, at some loss of precision in
    small updates."""


class LoraPart(Section):
    """LoRA (arXiv:2106.09685) on one part of the model."""

    r: Count = 16
    """Rank of the LoRA matrices. Higher ranks can learn more and take more memory."""
    lora_alpha: Count = 32
    """Scale of the LoRA weights: they are multiplied by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    target_modules: Names = ("all-linear",)
    """Matrices that get LoRA weights: all-linear for all of them, or a list of name endings such as q_proj or
    layers.0.mlp.up_proj."""


def _lora_doc(part: Part) -> str:
    needs = "" if part.trainable is None else f" Needs trainable.{part.name} false."
    return f"LoRA on the {part.label}. null: none.{needs}"


@with_keys({part.name: (LoraPart | None, Field(None, description=_lora_doc(part))) for part in LORA_PARTS})
class LoraSection(Section):
    """LoRA, configured per part (null: no LoRA there); dropout, variants and initialization are shared by all
    parts."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of LoRA layers."""
    use_dora: bool = False
    """Use DoRA (arXiv:2402.09353), which learns magnitude and direction separately; slower than plain LoRA."""
    use_rslora: bool = False
    """Use rsLoRA (arXiv:2312.03732), which scales by lora_alpha / sqrt(r); useful with high ranks."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "loftq", "eva"] = "default"
    """Initialization of the LoRA weights. pissa (arXiv:2404.02948) needs unquantized matrices, loftq
    (arXiv:2310.08659) 4-bit ones; eva (arXiv:2410.07170) uses the first training batches."""

    @property
    def parts(self) -> dict[str, LoraPart]:
        """The parts that get LoRA, by name."""
        named = {part.name: getattr(self, part.name) for part in LORA_PARTS}
        return {name: part for name, part in named.items() if part is not None}


class Recipe(Section):
    """Recipe of a flamingo_ft training run."""

    model: ModelSection
    """Both backbones and the bridge between them."""
    trainable: TrainableSection = TrainableSection()
    """Which parts of the bridge are trained in full."""
    lora: LoraSection = LoraSection()
    """LoRA on the backbones or on parts of the bridge."""
    data: DataSection
    """Training and evaluation data."""
    train: TrainSection
    """Training: length, optimization, checkpoints, logging."""
    eval: EvalSection = EvalSection()
    """Evaluation on the held-out samples."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if found := list(contradictions(self)):
            reasons = "; ".join(f"{'.'.join(map(str, location))}: {reason}" for location, reason in found)
            raise PydanticCustomError(CONTRADICTION, "{reasons}", {"found": found, "reasons": reasons})
        return self


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Location and message of each cross-field validation error."""
    trained = [
        part for part in ("perceiver", "cross_attention", "new_tokens") if getattr(recipe.trainable, part)
    ]
    for part in recipe.lora.parts:
        if part in trained:
            reason = (
                f"trainable.{part} is true too; a part trains whole or through LoRA: set one to false or null"
            )
            yield ("lora", part), reason
    if not (trained or recipe.lora.parts):
        yield ("trainable",), "nothing would train; set one part to true, or give one LoRA"
    if recipe.model.bridge_quantization != "none" and recipe.model.init_from is None:
        reason = "a fresh bridge has nothing worth freezing; use none, or name a model.init_from"
        yield ("model", "bridge_quantization"), reason
    elif recipe.model.bridge_quantization != "none" and {"perceiver", "cross_attention"} <= set(trained):
        yield (
            ("model", "bridge_quantization"),
            "all of the bridge trains, and what trains cannot be quantized; use none",
        )
    yield from contradictions_of_data(recipe)
    yield from contradictions_of_training(recipe)
