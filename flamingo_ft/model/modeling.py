"""The Flamingo model in transformers' form.

Flamingo (arXiv:2204.14198). Shapes: B samples, M media, F frames, C channels, H height, W width, T text tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo_ft.backbones.attention import is_unfused, unfuse_attention
from flamingo_ft.backbones.tower import build_visual, non_persistent_buffers

from .added_tokens import add_tokens, check_embeddings, grow_vocabulary
from .conditioning import cache_in
from .configuration import FlamingoConfig
from .core import FlamingoCore
from .cross_attention import GatedCrossAttentionBlock
from .media import media_input
from .packed import for_language_model
from .perceiver import PerceiverResampler
from .pretrained import from_parts
from .quantized import finish_quantized, keeping_the_head, mark_quantized, refuse_put_together, stored_config


class FlamingoForConditionalGeneration(FlamingoCore, PreTrainedModel, GenerationMixin):
    """A language model that reads images through a perceiver resampler and gated cross-attention.

    ``vision_encoder`` is an OpenCLIP tower (its ``.visual``), ``lang_encoder`` any causal language model of
    transformers, untouched. Made by `build_flamingo` from two backbones, by ``from_pretrained`` from a saved model.
    """

    config: FlamingoConfig  # pyrefly: ignore[bad-override]
    lang_encoder: PreTrainedModel
    adapter_base: str | None  # the composition that a loaded adapter names as its base
    initial_lora: dict[str, Tensor]  # what PiSSA started from, by name in an adapter
    config_class = FlamingoConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["GatedCrossAttentionBlock"]  # beside those of the language model
    _keep_in_fp32_modules_strict = ["attn_gate", "ff_gate"]  # too fine for fewer bits

    def __init__(
        self,
        config: FlamingoConfig,
        vision_encoder: nn.Module | None = None,
        lang_encoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_encoder = build_visual(config.vision_config) if vision_encoder is None else vision_encoder
        self.lang_encoder = lang_encoder or AutoModelForCausalLM.from_config(config.text_config)
        if config.open_attention:
            unfuse_attention(self.vision_encoder)
        config.open_attention = config.open_attention or is_unfused(self.vision_encoder)
        _keep_weights(self.vision_encoder)
        _keep_weights(self.lang_encoder)
        config.text_config = self.lang_encoder.config
        self.build_bridge(
            vis_dim=config.vision_width,
            media_token_id=config.media_token_id,
            every=config.cross_attn_every_n_layers,
            visibility=config.media_visibility,
            perceiver=config.perceiver,
            cross_attention=config.cross_attention,
            new_token_ids=config.new_token_ids or (),
            decoder_layers_attr_name=config.decoder_layers_attr_name,
        )
        self.post_init()
        self.requires_grad_(False)
        mark_quantized(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every model of transformers, and for an adapter's folder or a composition that names its backbones (`parts`):
        base and adapter. With a ``quantization_config`` of bitsandbytes, the tower is quantized whole, its fused attention
        too, and the language model's output head is not."""
        joined = from_parts(pretrained_model_name_or_path, kwargs)
        if joined is not None:
            return joined
        wanted = kwargs.get("quantization_config")
        config = stored_config(pretrained_model_name_or_path, kwargs) if wanted is not None else None
        is_new = config is not None and getattr(config, "quantization_config", None) is None
        if is_new:
            kwargs["quantization_config"] = keeping_the_head(wanted, config)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        finish_quantized(loaded[0] if isinstance(loaded, tuple) else loaded, is_new)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As every model of transformers. Raises UserError for one put together from quantized backbones."""
        refuse_put_together(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        vision_tokens: Tensor | None = None,
        frame_counts: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over input_ids (B, T), with one media token per image or video.

        pixel_values (B, M, C, H, W), or (B, M, F, C, H, W) with frames: the media of each row in order, padded at the
        end of M where a row has fewer. vision_tokens (B, M, F, V, D) in their place are the tower's spatial tokens of
        them, and the tower is not run. frame_counts (B, M): how many of the F frames each medium has, where not all
        have F; the others are padding, which changes nothing. With ``past_key_values``: the media of all tokens, those
        of the new tokens (M as many as the row with most mentions), or None to go on with those seen. With
        ``document_ids`` (B, T) a row holds several documents, and a token sees the media of its own; ``position_ids``
        that begin anew with each keep them apart in the language model. Other arguments go to the language model, whose
        output this returns. Raises UserError when a row has more media tokens than media, and without input_ids.
        """
        given = {"attention_mask": attention_mask, "labels": labels, "past_key_values": past_key_values}
        given = for_language_model(
            self.lang_encoder, given | {"use_cache": use_cache, **kwargs}, document_ids
        )
        media = media_input(pixel_values, vision_tokens, frame_counts)
        with self.looking_at(input_ids, media, cache_in(given), document_ids):
            return self.lang_encoder(input_ids=input_ids, **given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`; under TRL's fused loss (``fused_lm_head``) without a gradient of the frozen output head."""
        with self.scoring_rows_apart() if kwargs.get("fused_lm_head") else nullcontext():
            return super().__call__(*args, **kwargs)

    def scoring_rows_apart(self) -> AbstractContextManager[None]:
        """Inside, `backbone` and `get_output_embeddings` split the logits of the trained rows from the others, which
        saves a loss that multiplies one by the other a copy and a gradient of the matrix (`output_head`)."""
        head = self.lang_encoder.get_output_embeddings()
        return nullcontext() if self.token_rows is None else self.token_rows.scored_apart(head)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frame_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's own ``generate`` (beams, sampling, streamers, assisted decoding, ...) over the media.

        Takes pixel_values and frame_counts as `forward` does; returns what the language model's ``generate`` returns.
        """
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        given = media_input(pixel_values, frame_counts=frame_counts)
        return self.generate_text(inputs if input_ids is None else input_ids, given, **kwargs)

    def cache_media(self, input_ids: Tensor, pixel_values: Tensor) -> None:
        """Encode the media of ``input_ids`` (B, T) once, for every forward without media until `uncache_media`."""
        self.hold_media(input_ids, media_input(pixel_values))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not in transformers' sense: for foreign classes it leaves buffers that checkpoints lack uninitialised."""
        return False

    @property
    def backbone(self) -> Backbone:
        """The model without its output head, as trainers that score in tiles ask for it."""
        return Backbone(self)

    @property
    def generation_config(self) -> GenerationConfig:
        """The language model's."""
        return self.lang_encoder.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if "lang_encoder" in self._modules:  # PreTrainedModel sets one before there is a language model
            self.lang_encoder.generation_config = value

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_encoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The language model's output head, the rows of new tokens in place."""
        head = self.lang_encoder.get_output_embeddings()
        return head if self.token_rows is None else self.token_rows.head_with_rows(head)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the language model another embedding; the rows of new tokens stand in for those of this one then."""
        check_embeddings(value, self.token_rows, "set_input_embeddings")
        self.lang_encoder.set_input_embeddings(value)
        self.follow_language_model()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the language model another output head, as `set_input_embeddings` an embedding."""
        check_embeddings(new_embeddings, self.token_rows, "set_output_embeddings")
        self.lang_encoder.set_output_embeddings(new_embeddings)
        self.follow_language_model()

    def get_decoder(self) -> nn.Module:
        """The language model without its output head, and without media."""
        return self.lang_encoder.get_decoder()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Make room for tokens that were added to the tokenizer, ``new_num_tokens`` with them; to be called before an
        optimizer is made. Returns the input embeddings.

        The language model's matrices grow where they are too small, and never shrink. The added tokens get rows of
        the Flamingo's own beside those of ``<image>`` (`token_rows`), which train and are saved with them. They start
        as the language model's spare rows, or where it had none at the mean of all, whatever ``mean_resizing``. Raises
        UserError for fewer tokens than are in use, and where rows cannot be added any more.
        """
        if new_num_tokens is not None:
            add_tokens(self, new_num_tokens)
        if pad_to_multiple_of is not None:
            rows = len(self.get_input_embeddings().weight)
            grow_vocabulary(self.lang_encoder, -(-rows // pad_to_multiple_of) * pad_to_multiple_of)
        self.follow_language_model()
        return self.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Fill in what a checkpoint lacked; torch's own initialisation, gates closed."""
        if module is self.vision_encoder:
            _restore_buffers(module, self.config.vision_config)
        elif isinstance(module, GatedCrossAttentionBlock):
            nn.init.zeros_(module.attn_gate)
            nn.init.zeros_(module.ff_gate)
        elif isinstance(module, PerceiverResampler):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter)
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
            module.reset_parameters()


class Backbone(nn.Module):
    """A view of a Flamingo that stops before the output head; it owns no parameters.

    forward takes what `FlamingoForConditionalGeneration.forward` takes, but labels, and returns ``last_hidden_state``
    (B, T, D); with ``predicting`` (N, 2), rows and columns, that of those positions alone: (1, N, D). Inside
    `scoring_rows_apart` D is as wide as the matrix of `get_output_embeddings` there.
    """

    def __init__(self, model: FlamingoForConditionalGeneration):
        super().__init__()
        self._model = [model]  # in a list, so that it is not registered as a submodule of its own view

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        vision_tokens: Tensor | None = None,
        frame_counts: Tensor | None = None,
        document_ids: Tensor | None = None,
        predicting: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        (model,) = self._model
        given = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        given = for_language_model(model.lang_encoder, given, document_ids)
        cache, conditioning = cache_in(given), model.conditioning
        media = media_input(pixel_values, vision_tokens, frame_counts)
        with model.looking_at(input_ids, media, cache, document_ids):
            conditioning.start(input_ids, cache)
            output = _body_of(model.lang_encoder)(input_ids=input_ids, **given)
            conditioning.finish(cache_in(output) if cache is None else cache)
        if predicting is not None:
            output.last_hidden_state = output.last_hidden_state[predicting[:, 0], predicting[:, 1]][None]
        if model.token_rows is not None:
            output.last_hidden_state = model.token_rows.before_head(output.last_hidden_state)
        return output


def _body_of(lm: PreTrainedModel) -> nn.Module:
    """The language model without its head; a few families name themselves as their own base model."""
    return lm.model if lm.base_model is lm else lm.base_model


def _keep_weights(module: nn.Module) -> None:
    """Mark a backbone that has its weights, so that initialising the Flamingo around it leaves them alone."""
    if not any(p.is_meta for p in module.parameters()):
        for part in module.modules():
            part._is_hf_initialized = True


def _restore_buffers(visual: nn.Module, vision_config: dict) -> None:
    """Recompute the buffers that checkpoints do not hold."""
    for name, value in non_persistent_buffers(vision_config).items():
        parent, _, leaf = name.rpartition(".")
        owner = visual.get_submodule(parent)
        setattr(owner, leaf, value.to(getattr(owner, leaf)))
