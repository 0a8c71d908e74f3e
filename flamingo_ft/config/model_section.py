"""Sections ``model``, ``trainable`` and ``lora`` of a recipe: backbones, bridge, and what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flamingo_ft.config.section import (
    ComputeDtype,
    Count,
    LanguageName,
    ModuleNames,
    QuantizationFormat,
    Section,
    StartPath,
    TowerName,
    WeightsName,
    with_keys,
)
from flamingo_ft.config.tables import BRIDGE_PARTS, LORA_PARTS, Part


class VisionSection(Section):
    """The frozen vision tower, from OpenCLIP or timm."""

    name: TowerName
    """The tower: `nano` (comes with the package), an OpenCLIP architecture such as ViT-L-14,
    `hf-hub:org/name` for an OpenCLIP model on the Hub, `timm/NAME` or `timm/NAME.TAG` for a timm image model
    with its own pretrained weights (such as timm/vit_small_patch14_dinov2.lvd142m; without a tag, timm's
    default one), or a folder: one in OpenCLIP's local-dir format (it contains open_clip_config.json), or one
    with a timm model's config.json and model.safetensors. A folder is relative to the recipe file; in an
    override, to the current directory. Write `./` before a folder that has the name of an architecture."""
    pretrained: WeightsName | None = None
    """OpenCLIP's tag of the pretrained weights, such as openai or laion2b_s34b_b79k, or a weights file,
    relative to the recipe file (in an override, to the current directory). null: the weights that belong to
    the name; a bare OpenCLIP architecture has none and starts from random weights."""
    image_size: Count | None = None
    """Height and width in pixels that images are resized to. Position embeddings are interpolated to match.
    Raise it for small text or details; time and memory of the tower grow with its square. null: the tower's
    own size."""
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """How images are made square. shortest: resize the shorter side and crop the longer one. longest: resize
    the longer side and pad the shorter one, so that nothing is lost. squash: change the aspect ratio. null:
    as the tower was trained, but a timm model's crop_pct is not applied: the shorter side stays whole."""
    layer: int = -1
    """Layer of the tower whose output is read: -1 is the last, -2 the one before it, 0 the first. For
    convolutional towers, it is the stage. The layers after it are not computed. With ViTs, -2 is LLaVA's
    choice: the last layer serves the tower's own training objective, the one before keeps more of each
    place. Leave it at -1 for OpenFlamingo's weights."""
    pixel_shuffle: bool = False
    """Join each 2 x 2 neighbouring tokens into one of four times the width (InternVL, arXiv:2404.16821): a
    quarter of the tokens without averaging, for large images and tiles. The bridge's matrices that read them
    become four times as large. Needs a grid of tokens with even sides; set image_size if it has odd ones."""
    quantization: QuantizationFormat = "none"
    """Quantization of the tower's weight matrices with bitsandbytes: none, 8 bits (int8) or 4 bits (nf4,
    fp4). Saves memory at some cost in accuracy and speed; nf4 is usually the more accurate 4-bit format."""
    double_quantization: bool = True
    """With nf4 and fp4, quantize the block scales as well, which saves 0.37 bits per weight (QLoRA,
    arXiv:2305.14314, section 3)."""
    compute_dtype: ComputeDtype = "auto"
    """dtype in which quantized matrices are dequantized and multiplied. auto: bf16 if the GPU supports it
    or the CPU has instructions for it; fp16 on older GPUs; fp32 on other CPUs."""


class LanguageSection(Section):
    """The frozen language model: any causal language model of transformers, or a vision-language model's."""

    name: LanguageName
    """The language model: `nano` (comes with the package), a repository on the Hugging Face Hub, or a folder
    that contains config.json. A folder is relative to the recipe file; in an override, to the current
    directory. Write `./` before a folder that has the name of a repository."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null: the default branch. The commit is recorded with the adapter
    either way."""
    quantization: QuantizationFormat = "none"
    """Quantization of the language model's weight matrices with bitsandbytes: none, 8 bits (int8) or 4 bits
    (nf4, fp4). Saves memory at some cost in accuracy and speed; nf4 is usually the more accurate 4-bit
    format."""
    double_quantization: bool = True
    """With nf4 and fp4, quantize the block scales as well, which saves 0.37 bits per weight (QLoRA,
    arXiv:2305.14314, section 3)."""
    compute_dtype: ComputeDtype = "auto"
    """dtype in which quantized matrices are dequantized and multiplied. auto: bf16 if the GPU supports it
    or the CPU has instructions for it; fp16 on older GPUs; fp32 on other CPUs."""
    decoder_layers_attr_name: str | None = None
    """Dotted attribute path of the list of decoder layers, such as model.layers. null: detected
    automatically. Set it only if an error asks for it."""


class PerceiverSection(Section):
    """The perceiver resampler, which turns the tokens of an image or video into a fixed number of latents."""

    num_latents: Count = 64
    """Latents per image or video that the language model attends to. More of them keep more detail and cost
    more time. This default and those of the sizes below are the released OpenFlamingo models'."""
    depth: Annotated[int, Field(ge=0)] = 0
    """Number of layers, each of attention and feed-forward. 0: nothing is resampled; the text attends to the
    visual tokens themselves (of a video, to their mean over the frames), and the other sizes in this section
    are not used. A new bridge learns from far fewer samples without a perceiver; raise it to 6, as in
    OpenFlamingo, for many images or frames per sample. With init_from, the default is 6."""
    heads: Count = 8
    """Attention heads per layer."""
    dim_head: Count = 64
    """Width of an attention head."""
    ff_mult: Count = 4
    """Hidden width of the feed-forward layers, as a multiple of the vision tower's width."""
    max_num_media: Count | None = None
    """Number of images per sample that get a learned position embedding, which distinguishes the first image
    from the second. null: no such embedding."""
    max_num_frames: Count | None = None
    """Number of frames per video that get a learned position embedding, which encodes their order. null: no
    such embedding; frames are then an unordered set."""


class CrossAttentionSection(Section):
    """The gated cross-attention blocks, through which text tokens attend to the latents of images."""

    heads: Count = 8
    """Attention heads per block. The defaults of this section are those of the released OpenFlamingo
    models."""
    dim_head: Count = 64
    """Width of an attention head."""
    ff_mult: Count = 4
    """Hidden width of the feed-forward layers, as a multiple of the language model's width."""


def _or_null(schema: dict[str, Any]) -> None:
    """Allow null in a section's JSON schema."""
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, {"type": "null"}]


RELEASED_PERCEIVER = PerceiverSection(depth=6)  # of the released OpenFlamingo models


class ModelSection(Section):
    """Both backbones and the bridge between them."""

    vision: VisionSection
    """The frozen vision tower."""
    language: LanguageSection
    """The frozen language model."""
    cross_attn_every_n_layers: Count = 1
    """Insert a gated cross-attention block before every n-th decoder layer. Larger values save parameters,
    memory and time, and leave less capacity for images."""
    media_visibility: Literal["immediate", "all_preceding", "following"] = "immediate"
    """Images that a text token attends to: the last one before it (immediate, as in Flamingo), all before it
    (all_preceding), or the next one after it (following, as in OpenFlamingo v1)."""
    init_from: StartPath | None = None
    """Initialize the bridge from an adapter's folder, a merged model's folder, an OpenFlamingo checkpoint, or
    one of these on the Hub as org/name[@revision]. A path is relative to the recipe file; in an override and
    in a packaged recipe, to the current directory. null: a newly initialized bridge."""
    bridge_quantization: QuantizationFormat = "none"
    """Quantization of those parts of the bridge (perceiver, cross-attention) that stay frozen. Trainable
    parts are never quantized. Needs init_from."""
    perceiver: Annotated[PerceiverSection, Field(json_schema_extra=_or_null)] = PerceiverSection()
    """Shape of the perceiver resampler. null: none, the same as depth 0."""
    cross_attention: CrossAttentionSection = CrossAttentionSection()
    """Shape of the gated cross-attention blocks."""

    @model_validator(mode="before")
    @classmethod
    def _default_perceiver(cls, values: Any) -> Any:
        """Fill in the depth of the released models' perceiver, unless the recipe gives another one."""
        if not isinstance(values, dict):
            return values
        perceiver = values.get("perceiver", {})
        if perceiver is None:
            return {**values, "perceiver": {"depth": 0}}
        if values.get("init_from") is None or not isinstance(perceiver, dict):
            return values
        return {**values, "perceiver": {"depth": RELEASED_PERCEIVER.depth, **perceiver}}


@with_keys(
    {
        part.name: (bool, Field(part.trainable, description=f"Train the {part.label} in full."))
        for part in BRIDGE_PARTS
    }
)
class TrainableSection(Section):
    """Parts of the bridge that are trained in full.

    The backbones stay frozen; LoRA is configured under lora.
    """

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype in which trainable weights are stored. auto: fp32. bf16 halves their memory, but rounds small
    optimizer steps away; use it only if memory runs out."""


RSLORA_MIN_RANK = 64  # from which on rsLoRA is the default


class LoraPart(Section):
    """LoRA (arXiv:2106.09685) on one part of the model."""

    r: Count = 16
    """Rank of the LoRA matrices. Higher ranks can learn more and take more memory."""
    lora_alpha: Count = 32
    """Scale of the LoRA weights: they are multiplied by lora_alpha / r, or by lora_alpha / sqrt(r) with
    use_rslora."""
    target_modules: ModuleNames = ("all-linear",)
    """Matrices that get LoRA weights: all-linear for every one, or a list of name endings such as q_proj or
    layers.0.mlp.up_proj."""


def _lora_documentation(part: Part) -> str:
    needs = "" if part.trainable is None else f" Needs trainable.{part.name} false."
    return f"LoRA on the {part.label}. null: none.{needs}"


@with_keys(
    {part.name: (LoraPart | None, Field(None, description=_lora_documentation(part))) for part in LORA_PARTS}
)
class LoraSection(Section):
    """LoRA on the backbones or on parts of the bridge.

    Rank, scale and target modules are set per part (null: no LoRA there), all other keys apply to every part.
    """

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of LoRA layers. Raise it if the model overfits a small dataset."""
    use_dora: bool = False
    """Use DoRA (arXiv:2402.09353), which trains magnitude and direction separately: often better at low
    ranks, slower than plain LoRA."""
    use_rslora: bool | None = None
    """Use rsLoRA (arXiv:2312.03732), which scales by lora_alpha / sqrt(r) and keeps high ranks useful: in
    PEFT's comparison on MetaMathQA, rank 64 scores 51.3 % with it and 47.4 % without. null: true if r is at
    least 64 for every part, unless init_lora_weights is pissa; with an init_from that has LoRA weights, what
    they were trained with. One value applies to all parts, so one part below 64 turns the default off."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "loftq", "eva"] = "default"
    """Initialization of the LoRA weights. default: zero output, so that training starts from the model
    itself. pissa (arXiv:2404.02948) needs unquantized matrices, loftq (arXiv:2310.08659) 4-bit ones; eva
    (arXiv:2410.07170) is computed from the first training batches."""

    @property
    def rank_stabilized(self) -> bool:
        """Whether LoRA weights are scaled by lora_alpha / sqrt(r): `use_rslora`, or its default."""
        if self.use_rslora is not None:
            return self.use_rslora
        # PiSSA is saved as LoRA of twice the rank, which rsLoRA would scale differently.
        has_high_rank = bool(self.parts) and min(part.r for part in self.parts.values()) >= RSLORA_MIN_RANK
        return has_high_rank and self.init_lora_weights != "pissa"

    @property
    def parts(self) -> dict[str, LoraPart]:
        """The parts that get LoRA, by name."""
        sections = {part.name: getattr(self, part.name) for part in LORA_PARTS}
        return {name: section for name, section in sections.items() if section is not None}
