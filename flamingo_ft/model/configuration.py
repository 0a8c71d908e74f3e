"""The model's configuration, as a transformers config."""

from __future__ import annotations

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from flamingo_ft.backbones.mosaic_gpt import register_mosaic_gpt

from .compat import SubConfigSpec

register_mosaic_gpt()  # a text_config may be one

# Incremented when a key or a file of an adapter or a saved model changes its meaning.
FORMAT_VERSION = 1


@strict
class FlamingoConfig(PreTrainedConfig):
    r"""Configuration of `FlamingoForConditionalGeneration`.

    Args:
        text_config: the causal language model's own configuration.
        vision_config: the OpenCLIP tower's architecture (`backbones.tower.build_visual` builds from it).
        vision_preprocess: the tower's image transform, as OpenCLIP's ``PreprocessCfg``.
        vision_width: width of the tower's spatial tokens.
        cross_attn_every_n_layers: n, for a gated cross-attention block before every n-th decoder layer
            (layers k with (k + 1) % n == 0).
        media_visibility: which media a text token sees: ``immediate`` (the last before it),
            ``all_preceding``, or ``following`` (the next one, as OpenFlamingo v1).
        perceiver: arguments of `PerceiverResampler` besides the width.
        cross_attention: arguments of `GatedCrossAttentionBlock` besides the widths.
        media_token_id: id of ``<image>``, one per image or video; also under the name ``image_token_id``.
        eoc_token_id: id of ``<|endofchunk|>``.
        tile_tag_ids: ids of the text tags of tiles (`tile_tags`), None for no such tags.
        new_token_ids: ids of the tokens that were added to the vocabulary; their rows are the Flamingo's own.
        decoder_layers_attr_name: dotted path of the decoder layers in the language model; None to find them.
        backbones: where both backbones came from: name, revision and content hash of ``vision`` and
            ``language``.
        licenses: the licenses of ``vision`` and ``language``, from their model cards.
        bridge_init: what the bridge was started from: path and content hash; None for random weights.
        bridge_quantization: quantization of the frozen parts of the bridge, None for none.
        adapter_parts: the parts of the bridge that are stored in adapters of this model, None for all; the
            others belong to its base.
        merged: what was merged into this model, None for a model that is not a merge.
        converted_from: the format of the checkpoint that the bridge was converted from, None for a bridge
            trained with this package.
        trained_on: what the training samples were like (`adapters.trained_on`), None if that is not recorded.
        open_attention: whether the tower's fused attention is split into linear layers
            (`backbones.attention`), as in a stored quantized tower.
        format_version: version of the file format.
    """

    model_type = "flamingo"
    # Other vision-language models' names for it, which trainers read.
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
    tile_tag_ids: list[int] | None = None
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
    trained_on: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Copied: transformers writes into it, and would reset the attention implementation of a loaded model.
        self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
