"""The keys of a recipe, their types, defaults and meaning.

Values are strict (no text where a number is wanted) and frozen; a key that is not declared here is an error.
What this version cannot do yet is refused in words, so that no recipe is quietly run as something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

REFUSED_FOR_NOW = "refused_for_now"  # the kind of a refusal whose reason needs the value that was found
_LAX = Field(strict=False)  # YAML has text where Python has paths, and lists where a frozen recipe has tuples
Count = Annotated[int, Field(ge=1)]
FilePath = Annotated[Path, _LAX]


def _refuse_for_now(reason: str, *, only: Any) -> BeforeValidator:
    """A validator that lets `only` through and tells every other value why not."""

    def check(value: Any) -> Any:
        if value != only:
            raise PydanticCustomError(REFUSED_FOR_NOW, "{reason}", {"reason": reason})
        return value

    return BeforeValidator(check)


Unquantized = Annotated[
    Literal["none"], _refuse_for_now("this version trains unquantized backbones only; use none", only="none")
]
UnquantizedBridge = Annotated[
    Literal["none"], _refuse_for_now("this version keeps the bridge unquantized; use none", only="none")
]
WithoutLora = Annotated[
    None, _refuse_for_now("this version trains the bridge without LoRA; use null", only=None)
]
FreshBridge = Annotated[
    None, _refuse_for_now("this version starts every run from a fresh bridge; use null", only=None)
]


class Section(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class VisionSection(Section):
    """The frozen vision tower, from OpenCLIP."""

    name: str
    """`nano`, an OpenCLIP architecture, `hf-hub:org/name`, or a folder (from `/`, `./`, `../` or `~` on)."""
    pretrained: str | None = None
    """OpenCLIP's tag of the weights, or their file. null: the name's own; random for an architecture."""
    quantization: Unquantized = "none"
    """How the tower's weights are kept in memory."""


class LanguageSection(Section):
    """The frozen language model, any causal LM of transformers."""

    name: str
    """`nano`, a name on the Hugging Face Hub, or a folder (from `/`, `./`, `../` or `~` on)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null: the default branch, whose commit is recorded."""
    quantization: Unquantized = "none"
    """How the language model's weights are kept in memory."""
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
    init_from: FreshBridge = None
    """The bridge to start from."""
    bridge_quantization: UnquantizedBridge = "none"
    """How the parts of the bridge that stay frozen are kept in memory."""
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

    @model_validator(mode="after")
    def _something_trains(self) -> TrainableSection:
        if not (self.perceiver or self.cross_attention or self.new_tokens):
            raise PydanticCustomError("nothing_trains", "nothing would train; set one part to true")
        return self


class LoraSection(Section):
    """LoRA on each part, or null."""

    language: WithoutLora = None
    """LoRA on the language model."""
    cross_attention: WithoutLora = None
    """LoRA on the cross-attention blocks."""
    perceiver: WithoutLora = None
    """LoRA on the perceiver resampler."""
    vision: WithoutLora = None
    """LoRA on the vision tower."""


class DataSource(Section):
    """One file of samples with their images."""

    path: FilePath
    """File of samples, relative to the recipe."""
    format: Literal["auto", "messages"] = "auto"
    """Schema of the samples. auto: recognised from the first one."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often this source is drawn from, relative to the other sources."""
    image_root: FilePath | None = None
    """Folder that the samples' image paths start from, relative to the recipe. null: the folder of `path`."""


class DataSection(Section):
    """What is learned from, and what is never trained on."""

    train: Annotated[tuple[DataSource, ...], _LAX, Field(min_length=1)]
    """Sources of the training samples."""
    eval: Annotated[tuple[DataSource, ...], _LAX] = ()
    """Sources of the held-out samples. Empty: no evaluation."""
    max_text_tokens: Count | None = None
    """Longest sample in text tokens. null: the language model's context."""


class TrainSection(Section):
    """How training goes."""

    output_dir: FilePath
    """Folder that the run is written to, relative to the current directory. Must be new or empty."""
    max_steps: Count
    """Optimizer steps."""
    batch_size: Count = 8
    """Samples per device and forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decoupled weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from zero."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_steps: Count | None = None
    """Steps between checkpoints. null: only the final adapter is saved."""
    logging_steps: Count = 10
    """Steps between two logged losses."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of samples."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the computation. auto: bf16 where the GPU supports it, else fp32."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes that prepare batches beside the training process. 0: none."""


class EvalSection(Section):
    """How the held-out samples are judged."""

    batch_size: Count = 8
    """Samples answered at once."""
    max_new_tokens: Count = 32
    """Longest answer in tokens."""
    max_samples: Count | None = None
    """Only the first samples of each source. null: all."""
    before: bool = True
    """Also answer before training, for comparison."""
    shuffled_images: bool = True
    """Also answer with another sample's images, to show what is really read from them."""


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
