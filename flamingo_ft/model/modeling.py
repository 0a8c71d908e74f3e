"""The Flamingo model, as a transformers model.

Flamingo (arXiv:2204.14198). Shapes: B samples, M media, F frames, C channels, H height, W width, T text
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo_ft.backbones.attention import is_unfused, unfuse_attention
from flamingo_ft.backbones.tower import build_visual, non_persistent_buffers
from flamingo_ft.errors import UserError

from .added_tokens import add_tokens, check_embeddings, grow_vocabulary
from .compat import deprecate_kwarg, keep_weights
from .configuration import FlamingoConfig
from .core import FlamingoCore
from .cross_attention import GatedCrossAttentionBlock
from .label_positions import LabelPositions
from .language_model_inputs import get_cache, language_model_inputs
from .media import media_input
from .perceiver import PerceiverResampler
from .pretrained import (
    AdapterFolders,
    check_saveable,
    exclude_output_head,
    find_adapter,
    finish_quantized,
    mark_quantized,
    stored_config,
)
from .token_rows import input_embedding


class FlamingoForConditionalGeneration(FlamingoCore, PreTrainedModel, GenerationMixin):
    """A language model that reads images through a perceiver resampler and gated cross-attention.

    ``vision_encoder`` is an OpenCLIP tower (its ``.visual``), ``lang_encoder`` any transformers causal
    language model, unchanged. `build_flamingo` builds one from two backbones, ``from_pretrained`` loads a
    saved one.
    """

    config: FlamingoConfig  # pyrefly: ignore[bad-override]
    lang_encoder: PreTrainedModel
    adapter_base: str | None  # the composition that a loaded adapter names as its base
    initial_lora: dict[str, Tensor]  # what PiSSA started from, by name in an adapter
    config_class = FlamingoConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["GatedCrossAttentionBlock"]  # besides those of the language model
    _keep_in_fp32_modules_strict = ["attn_gate", "ff_gate"]  # 16 bits round their small steps away

    def __init__(
        self,
        config: FlamingoConfig,
        vision_encoder: nn.Module | None = None,
        lang_encoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        # pyrefly: ignore[bad-argument-type]
        self.vision_encoder = build_visual(config.vision_config) if vision_encoder is None else vision_encoder
        self.lang_encoder = lang_encoder or AutoModelForCausalLM.from_config(config.text_config)
        if config.open_attention:
            unfuse_attention(self.vision_encoder)
        config.open_attention = config.open_attention or is_unfused(self.vision_encoder)
        for backbone in (self.vision_encoder, self.lang_encoder):
            if not any(parameter.is_meta for parameter in backbone.parameters()):
                keep_weights(backbone)
        config.text_config = self.lang_encoder.config
        self.build_bridge(
            vis_dim=config.vision_width,
            # pyrefly: ignore[bad-argument-type]
            media_token_id=config.media_token_id,
            tile_tag_ids=config.tile_tag_ids or (),
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
    def set_adapter_loader(cls, load: Callable[[AdapterFolders, Mapping[str, Any]], Any]) -> None:
        """Make ``from_pretrained`` load adapters and compositions with ``load``, which gets its options."""
        cls._load_adapter = staticmethod(load)  # pyrefly: ignore[bad-assignment]

    @staticmethod
    def _load_adapter(folders: AdapterFolders, options: Mapping[str, Any]) -> Any:
        raise UserError(
            f"{folders.adapter or folders.base}: an adapter, but flamingo_ft.adapters is not imported; "
            "import flamingo_ft.adapters first"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, or an adapter or composition (`pretrained`) with its base.

        With a bitsandbytes ``quantization_config``, the whole tower is quantized, fused attention included,
        and the language model's output head is not.
        """
        folders = find_adapter(pretrained_model_name_or_path, kwargs)
        if folders is not None:
            return cls._load_adapter(folders, kwargs)
        quantization, to_quantize = kwargs.get("quantization_config"), False
        if quantization is not None:
            config = stored_config(pretrained_model_name_or_path, kwargs)
            to_quantize = getattr(config, "quantization_config", None) is None  # else it is stored quantized
            if to_quantize:
                kwargs["quantization_config"] = exclude_output_head(quantization, config)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        finish_quantized(loaded[0] if isinstance(loaded, tuple) else loaded, to_quantize)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does. Raises UserError for a model with LoRA or from quantized backbones."""
        check_saveable(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any | None = None,
        use_cache: bool | None = None,
        vision_tokens: Tensor | None = None,
        frame_counts: Tensor | None = None,
        tile_grids: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over input_ids (B, T), with one media token per image or video.

        pixel_values (B, M, C, H, W), or (B, M, F, C, H, W) with frames: the media of each row in order,
        padded at the end of M. vision_tokens (B, M, F, V, D): the tower's output for them, passed instead to
        skip the tower. frame_counts (B, M): the number of frames of each medium, if not all have F; the rest
        is padding. tile_grids (B, M, 2): rows and columns of the tiles that an image is divided into, (1, 1)
        for none; its F views are then the tiles row by row, after the whole image if there is one more.
        cache: the key/value cache of earlier tokens; the media passed along are those of the whole text, or
        of the new tokens alone (M is then the largest number in a row), or None if the new tokens bring none.
        ``past_key_values`` is its older name. document_ids (B, T): the document of each token of packed rows;
        a token sees media of its own document, and ``position_ids`` that start anew keep documents apart in
        the language model. Other arguments go to the language model, whose output is returned.

        Raises UserError for a row with more media tokens than media, and without input_ids.
        """
        inputs = {"attention_mask": attention_mask, "labels": labels, "cache": cache, "use_cache": use_cache}
        inputs = language_model_inputs(self.lang_encoder, inputs | kwargs, document_ids)
        media = media_input(pixel_values, vision_tokens, frame_counts, tile_grids)
        with self.condition_on(input_ids, media, get_cache(inputs), document_ids):
            return self.lang_encoder(input_ids=input_ids, **inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`.

        With TRL's fused loss (``fused_lm_head``), only the positions that predict a label are scored, and the
        frozen head gets no gradient.
        """
        if not kwargs.get("fused_lm_head"):
            return super().__call__(*args, **kwargs)
        with self.scoring_rows_apart():
            if kwargs.get("labels") is None:  # it is given `shift_labels`, and scores all of them
                return super().__call__(*args, **kwargs)
            labels = LabelPositions.of(kwargs.pop("labels"))
            selected = {"shift_labels": labels.tokens, "predicting": labels.places}
            # As the first of the hooks, so that the others see the restored output.
            restoring = self.register_forward_hook(lambda _, __, output: labels.restore(output), prepend=True)
            try:
                return super().__call__(*args, **kwargs, **selected)
            finally:
                restoring.remove()

    def scoring_rows_apart(self) -> AbstractContextManager[None]:
        """Compute the logits of the trained token rows separately inside the context.

        A loss that multiplies the output of `backbone` by the matrix of `get_output_embeddings` then needs no
        copy and no gradient of the whole matrix (`token_rows`).
        """
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
        tile_grids: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model's own ``generate`` on the media.

        Its options work as usual: beams, sampling, streamers, assisted decoding. pixel_values, frame_counts,
        tile_grids, vision_tokens: see `forward`. Returns what the language model's ``generate`` returns.
        Raises UserError as `forward` does.
        """
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        media = media_input(pixel_values, vision_tokens, frame_counts, tile_grids)
        return self.generate_text(inputs if input_ids is None else input_ids, media, **kwargs)

    def cache_media(self, input_ids: Tensor, pixel_values: Tensor) -> None:
        """Encode the media of ``input_ids`` (B, T) once, for forwards without media until `uncache_media`.

        pixel_values: see `forward`. Raises UserError for another shape.
        """
        self.hold_media(input_ids, media_input(pixel_values))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers initializes buffers missing from a checkpoint."""
        return False

    @property
    def backbone(self) -> Backbone:
        """A view of the model without its output head, for trainers that compute the loss in tiles."""
        return Backbone(self)

    @property
    def generation_config(self) -> GenerationConfig:
        """The language model's generation configuration."""
        return self.lang_encoder.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        # PreTrainedModel.__init__ sets one before the language model exists.
        if "lang_encoder" in self._modules:
            # pyrefly: ignore[bad-assignment]
            self.lang_encoder.generation_config = value

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_encoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the language model's output head with the rows of new tokens in place."""
        head = self.lang_encoder.get_output_embeddings()
        return head if self.token_rows is None else self.token_rows.head_with_rows(head)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding; the rows of new tokens keep replacing its rows.

        Raises UserError for a value that is not a torch module, or that lacks rows of new tokens.
        """
        check_embeddings(value, self.token_rows, "set_input_embeddings")
        self.lang_encoder.set_input_embeddings(value)
        self.follow_language_model()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's output head. Raises UserError as `set_input_embeddings` does."""
        check_embeddings(new_embeddings, self.token_rows, "set_output_embeddings")
        self.lang_encoder.set_output_embeddings(new_embeddings)
        self.follow_language_model()

    def get_decoder(self) -> nn.Module:
        """Return the language model without its output head; called directly, it sees no media."""
        return self.lang_encoder.get_decoder()

    # pyrefly: ignore[bad-override]
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Make room for tokens that were added to the tokenizer; call it before the optimizer is built.

        new_num_tokens: size of the tokenizer with them. Returns the input embeddings. The language model's
        matrices grow if they are too small, and never shrink. The rows of added tokens are the Flamingo's
        own, next to those of ``<image>`` (`token_rows`), and are trained and saved with them. They start as
        the language model's spare rows, or else as the mean of all rows; ``mean_resizing`` has no effect.
        Raises UserError for fewer tokens than are in use, and where rows can no longer be added.
        """
        if new_num_tokens is not None:
            add_tokens(self, new_num_tokens)
        if pad_to_multiple_of is not None:
            rows = len(input_embedding(self.lang_encoder).weight)
            grow_vocabulary(self.lang_encoder, -(-rows // pad_to_multiple_of) * pad_to_multiple_of)
        self.follow_language_model()
        return self.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what a checkpoint lacks: torch's own initialization, gates at zero."""
        if module is self.vision_encoder:
            # pyrefly: ignore[bad-argument-type]
            _restore_buffers(module, self.config.vision_config)
        elif isinstance(module, GatedCrossAttentionBlock):
            nn.init.zeros_(module.attn_gate)
            nn.init.zeros_(module.ff_gate)
        elif isinstance(module, (PerceiverResampler, nn.Linear, nn.LayerNorm, nn.Embedding)):
            module.reset_parameters()


class Backbone(nn.Module):
    """A view of a Flamingo that stops before the output head; it owns no parameters.

    forward takes the arguments of `FlamingoForConditionalGeneration.forward` except labels, and returns
    ``last_hidden_state`` (B, T, D). predicting (N, 2): rows and columns of positions; only these are
    returned, as (1, N, D). Inside `scoring_rows_apart`, D is the width of the extended matrix of
    `get_output_embeddings`.
    """

    def __init__(self, model: FlamingoForConditionalGeneration):
        super().__init__()
        self._model = [model]  # in a list, so that it does not become a submodule of its own view

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any | None = None,
        use_cache: bool | None = None,
        vision_tokens: Tensor | None = None,
        frame_counts: Tensor | None = None,
        tile_grids: Tensor | None = None,
        document_ids: Tensor | None = None,
        predicting: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        (model,) = self._model
        inputs = {"attention_mask": attention_mask, "cache": cache, "use_cache": use_cache}
        inputs = language_model_inputs(model.lang_encoder, inputs | kwargs, document_ids)
        cache, conditioning = get_cache(inputs), model.conditioning
        media = media_input(pixel_values, vision_tokens, frame_counts, tile_grids)
        with model.condition_on(input_ids, media, cache, document_ids):
            assert input_ids is not None  # else `condition_on` has raised
            conditioning.start(input_ids, cache)
            output = _body_of(model.lang_encoder)(input_ids=input_ids, **inputs)
            conditioning.finish(get_cache(output) if cache is None else cache)
        if predicting is not None:
            output.last_hidden_state = output.last_hidden_state[predicting[:, 0], predicting[:, 1]][None]
        if model.token_rows is not None:
            output.last_hidden_state = model.token_rows.before_head(output.last_hidden_state)
        return output


def _body_of(lm: PreTrainedModel) -> nn.Module:
    """Return the language model without its head; a few families are their own ``base_model``."""
    return lm.model if lm.base_model is lm else lm.base_model


def _restore_buffers(visual: nn.Module, vision_config: dict) -> None:
    """Recompute the buffers that are not stored in checkpoints."""
    for name, value in non_persistent_buffers(vision_config).items():
        parent, _, leaf = name.rpartition(".")
        owner = visual.get_submodule(parent)
        setattr(owner, leaf, value.to(getattr(owner, leaf)))
