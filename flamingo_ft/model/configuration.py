"""What a Flamingo is made of, in transformers' form."""

from __future__ import annotations

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from flamingo_ft.backbones.mosaic_gpt import register_mosaic_gpt

from .compat import SubConfigSpec

register_mosaic_gpt()  # a text_config may be one

# Raised when a key or a file of an adapter or a saved model changes its meaning.
FORMAT_VERSION = 1


@strict
class FlamingoConfig(PreTrainedConfig):
    r"""Configuration of `FlamingoForConditionalGeneration`.

    Args:
        text_config: the causal language model's own configuration.
        vision_config: the OpenCLIP tower's architecture (`backbones.tower.build_visual` builds from it).
        vision_preprocess: the tower's image transform, as OpenCLIP's ``PreprocessCfg``.
        vision_width: width of the tower's spatial tokens.
        cross_attn_every_n_layers: a gated cross-attention block before decoder layer k where (k + 1) is a
            multiple.
        media_visibility: which media a text token sees: ``immediate`` (the last before it),
            ``all_preceding``, or ``following`` (the next one, as OpenFlamingo v1).
        perceiver: arguments of `PerceiverResampler` besides the width.
        cross_attention: arguments of `GatedCrossAttentionBlock` besides the widths.
        media_token_id: id of ``<image>``, one per image or video; also under the name ``image_token_id``.
        eoc_token_id: id of ``<|endofchunk|>``.
        new_token_ids: ids of the tokens that were added to the vocabulary; their rows are the Flamingo's own.
        decoder_layers_attr_name: dotted path of the decoder layers in the language model, where they are not
            found.
        backbones: where both backbones came from: name, revision and content hash of ``vision`` and
            ``language``.
        licenses: of ``vision`` and ``language``, as their model cards state them.
        bridge_init: what the bridge was started from: path and content hash; None for random weights.
        bridge_quantization: how the frozen parts of the bridge were kept, None for unquantized.
        adapter_parts: the parts of the bridge that adapters of this model hold, None for all; the base has
            the others.
        merged: what was merged into this model, None for a model that is no merge.
        converted_from: the format of another Flamingo's checkpoint that the bridge came from, None for one
            trained here.
        open_attention: whether the tower's attention has linear layers for its matrices
            (`backbones.attention`), which is how a quantized tower is stored.
        format_version: version of this package's file format.
    """

    model_type = "flamingo"
    # The names that other vision-language models have for it, which trainers read.
    attribute_map = {"image_token_id": "media_token_id", "image_token_index": "media_token_id"}
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | None = None
    vision_preprocess: dict[str, Any] | None = None
    vision_width: int = 768
    cross_attn_every_n_layers: int = 1
    media_visibility: Literal["immediate", "all_preceding", "following"] = "immediate"
    perceiver: dict[str, Any] | None = None
    cross_attention: dict[str, Any] | None = None
    media_token_id: int | None = None
    eoc_token_id: int | None = None
    new_token_ids: list[int] | None = None
    decoder_layers_attr_name: str | None = None
    backbones: dict[str, Any] | None = None
    licenses: dict[str, Any] | None = None
    open_attention: bool = False
    bridge_init: dict[str, Any] | None = None
    bridge_quantization: dict[str, Any] | None = None
    adapter_parts: list[str] | None = None
    merged: dict[str, Any] | None = None
    converted_from: str | None = None
    format_version: int = FORMAT_VERSION
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # A copy: what follows writes into it (it resets the attention implementation of a model already
        # loaded).
        self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
