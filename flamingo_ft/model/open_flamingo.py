"""OpenFlamingo's API of the model: scripts written for it run after changing their import.

Signatures follow OpenFlamingo 2.0.1 (arXiv:2308.01390). Shapes: B samples, M media, F frames, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision

from .added_tokens import EOC_TOKEN, MEDIA_TOKEN, add_media_tokens, grow_vocabulary, token_id
from .compat import IncompatibleKeys, checkpoint_block
from .core import FlamingoCore
from .language_model_inputs import language_model_inputs
from .layers import CheckpointedBlock
from .media import media_input
from .open_flamingo_checkpoints import is_open_flamingo, load_open_flamingo
from .pretrained import mark_quantized
from .processor import FlamingoImageProcessor
from .sight import Visibility


class Flamingo(FlamingoCore):
    """A Flamingo around an OpenCLIP model (its ``.visual``) and any transformers causal language model.

    Args:
        eoc_token_id: id of ``<|endofchunk|>``.
        media_token_id: id of ``<image>``.
        vis_dim: width of the tower's spatial tokens.
        cross_attn_every_n_layers: and the keyword arguments that OpenFlamingo does not have: see
            `FlamingoConfig`.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        UserError: the language model's decoder layers cannot be found.
    """

    def __init__(
        self,
        vision_encoder: nn.Module,
        lang_encoder: PreTrainedModel,
        eoc_token_id: int,
        media_token_id: int,
        vis_dim: int,
        cross_attn_every_n_layers: int = 1,
        gradient_checkpointing: bool = False,
        *,
        media_visibility: Visibility = "immediate",
        perceiver: Mapping[str, Any] | None = None,
        cross_attention: Mapping[str, Any] | None = None,
        decoder_layers_attr_name: str | None = None,
    ):
        super().__init__()
        self.eoc_token_id = eoc_token_id
        self.media_token_id = media_token_id
        self.vis_dim = vis_dim
        # pyrefly: ignore[bad-assignment]
        self.vision_encoder = getattr(vision_encoder, "visual", vision_encoder)
        self.lang_encoder = lang_encoder
        self.build_bridge(
            vis_dim=vis_dim,
            media_token_id=media_token_id,
            every=cross_attn_every_n_layers,
            visibility=media_visibility,
            perceiver=perceiver,
            cross_attention=cross_attention,
            decoder_layers_attr_name=decoder_layers_attr_name,
        )
        self._media_cached = False
        mark_quantized(self)
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    def forward(
        self,
        vision_x: Tensor | None,
        lang_x: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        clear_conditioned_layers: bool = True,
        past_key_values: Any | None = None,
        use_cache: bool = False,
    ) -> Any:
        """Run one forward and return the language model's output.

        lang_x (B, T); vision_x (B, M, F, C, H, W), or None for the media kept by `cache_media` or by an
        earlier forward with ``clear_conditioned_layers=False``. Raises UserError for another shape, and
        ValueError for vision_x while media are cached.
        """
        if self._media_cached and vision_x is not None:
            raise ValueError(
                "forward: got vision_x while media are cached; pass None, or call uncache_media() first"
            )
        if not self._media_cached and vision_x is not None:
            self.conditioning.release()
        inputs = {"attention_mask": attention_mask, "labels": labels, "use_cache": use_cache}
        inputs = language_model_inputs(self.lang_encoder, {**inputs, "cache": past_key_values})
        media = self.media_for(lang_x, media_input(vision_x), past_key_values)
        times = self.media_in_cache(lang_x, past_key_values) + (lang_x == self.media_token_id).sum(-1)
        with self.conditioning.open(media):
            output = self.lang_encoder(input_ids=lang_x, **inputs)
        if not clear_conditioned_layers and not self._media_cached:
            self.conditioning.hold(media, times)
        return output

    def generate(
        self, vision_x: Tensor, lang_x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the language model's ``generate`` and return lang_x (B, T) with the generated tokens appended.

        vision_x (B, M, F, C, H, W). Generation ends at ``<|endofchunk|>`` unless ``eos_token_id`` is given.
        Raises UserError for another shape.
        """
        kwargs.setdefault("eos_token_id", self.eoc_token_id)
        return self.generate_text(lang_x, media_input(vision_x), attention_mask=attention_mask, **kwargs)

    def cache_media(self, input_ids: Tensor, vision_x: Tensor) -> None:
        """Encode vision_x (B, M, F, C, H, W) once, for forwards without media until `uncache_media`.

        Text without media tokens counts as text that follows input_ids (B, T). Raises UserError for another
        shape.
        """
        self.hold_media(input_ids, media_input(vision_x))
        self._media_cached = True

    def uncache_media(self) -> None:
        """Drop the media kept by `cache_media`."""
        super().uncache_media()
        self._media_cached = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Checkpoint the activations of the language model's layers and the bridge's blocks."""
        self.lang_encoder.activation_checkpointing_enable(gradient_checkpointing_kwargs)
        options = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        for block in self.modules():
            if isinstance(block, CheckpointedBlock):
                checkpoint_block(block, options)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict with this model's keys, as torch does, or with OpenFlamingo's, which are mapped.

        With OpenFlamingo's keys, ``strict=False`` allows missing weights of the frozen backbones, which those
        files never have, but none of the bridge; ``strict=True`` raises torch's RuntimeError for any missing
        or unexpected key. Raises UserError as `load_open_flamingo` does.
        """
        if not is_open_flamingo(state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        report = load_open_flamingo(self, state_dict)
        if strict and (report.missing or report.unexpected):
            raise RuntimeError(
                f"load_state_dict: {len(report.missing)} missing and {len(report.unexpected)} unexpected "
                "keys; OpenFlamingo's checkpoints do not have the frozen backbones: pass strict=False"
            )
        return IncompatibleKeys(report.missing, report.unexpected)


def create_model_and_transforms(
    clip_vision_encoder_path: str,
    clip_vision_encoder_pretrained: str,
    lang_encoder_path: str,
    tokenizer_path: str,
    cross_attn_every_n_layers: int = 1,
    use_local_files: bool = False,
    decoder_layers_attr_name: str | None = None,
    freeze_lm_embeddings: bool = False,
    **flamingo_kwargs: Any,
) -> tuple[Flamingo, Callable, PreTrainedTokenizerBase]:
    """Build a Flamingo, its image transform and its tokenizer, as OpenFlamingo's function of this name does.

    The backbones are frozen; the perceiver, the cross-attention and, unless ``freeze_lm_embeddings``, the
    language model's input embeddings are trainable. Raises UserError as `load_vision`, `load_language` and
    `build_flamingo` do.
    """
    vision = load_vision(clip_vision_encoder_path, clip_vision_encoder_pretrained)
    language = load_language(lang_encoder_path, tokenizer=tokenizer_path, local_files_only=use_local_files)
    tokenizer = language.tokenizer
    add_media_tokens(tokenizer)
    grow_vocabulary(language.model, len(tokenizer))
    model = Flamingo(
        vision.visual,
        language.model,
        token_id(tokenizer, EOC_TOKEN),
        token_id(tokenizer, MEDIA_TOKEN),
        vis_dim=vision.width,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        decoder_layers_attr_name=decoder_layers_attr_name,
        **flamingo_kwargs,
    )
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(not freeze_lm_embeddings)
    return model, FlamingoImageProcessor(vision.preprocess).transform, tokenizer
