"""Build a new Flamingo from two backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.backbones.language import LanguageBackbone
from flamingo_ft.backbones.vision import VisionBackbone

from .added_tokens import EOC_TOKEN, MEDIA_TOKEN, add_media_tokens, grow_vocabulary, token_id
from .conditioning import Visibility
from .configuration import FlamingoConfig
from .modeling import FlamingoForConditionalGeneration
from .processor import FlamingoProcessor


def build_flamingo(
    vision: VisionBackbone,
    language: LanguageBackbone,
    *,
    cross_attn_every_n_layers: int = 1,
    media_visibility: Visibility = "immediate",
    perceiver: Mapping[str, Any] | None = None,
    cross_attention: Mapping[str, Any] | None = None,
    decoder_layers_attr_name: str | None = None,
    extra_tokens: Sequence[str] = (),
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build a Flamingo with a new bridge, all of it frozen, and its processor.

    ``<|endofchunk|>``, ``<image>`` and ``extra_tokens``, which are trained like these two, are added to the
    tokenizer. The other options are those of `FlamingoConfig`. Raises UserError if the language model's
    decoder layers cannot be found.
    """
    lm, tokenizer = language.model, language.tokenizer
    known_rows = len(tokenizer)
    new_token_ids = add_media_tokens(tokenizer, extra_tokens)
    grow_vocabulary(lm, len(tokenizer))
    config = FlamingoConfig(
        text_config=lm.config,
        vision_config=vision.config,
        vision_preprocess=vision.preprocess,
        vision_width=vision.width,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        media_visibility=media_visibility,
        perceiver=dict(perceiver or {}),
        cross_attention=dict(cross_attention or {}),
        media_token_id=token_id(tokenizer, MEDIA_TOKEN),
        eoc_token_id=token_id(tokenizer, EOC_TOKEN),
        new_token_ids=new_token_ids,
        decoder_layers_attr_name=decoder_layers_attr_name,
        backbones={"vision": vision.source, "language": language.source},
        licenses={"vision": vision.license, "language": language.license},
    )
    model = FlamingoForConditionalGeneration(config, vision.visual, lm)
    if model.token_rows is not None:
        model.token_rows.reset(lm, known_rows)
    return model, FlamingoProcessor.for_backbones(vision.preprocess, tokenizer)
