"""What both APIs of the model share: the bridge between the backbones, and the flow of media through it.

Shapes: R rows of text, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor

from flamingo_ft.backbones.decoder_layers import find_decoder_layers, hidden_size
from flamingo_ft.errors import UserError

from .conditioning import MediaConditioning, cache_length, past_of
from .cross_attention import GatedCrossAttentionBlock
from .language_model_inputs import get_cache, name_cache
from .media import (
    MediaInput,
    check_counts,
    cover_new_tokens_only,
    encode_media,
    extend,
    media_positions,
    no_media,
    positions_in_documents,
)
from .perceiver import PerceiverResampler
from .sight import Media, Visibility, repeat_rows
from .token_rows import TokenRows


class NoMediaToken(SuppressTokensLogitsProcessor):
    """Suppresses the media token during generation, since there would be no image for it, and tags of tiles.

    A class of its own, because transformers lets a processor that is passed in replace its own of the same
    class, and with it the user's ``suppress_tokens``.
    """


class FlamingoCore(nn.Module):
    """The modules and the forward flow of a Flamingo.

    `FlamingoForConditionalGeneration` and `Flamingo` are its two APIs.
    """

    vision_encoder: nn.Module
    lang_encoder: PreTrainedModel
    perceiver: PerceiverResampler
    gated_cross_attn_layers: nn.ModuleList
    token_rows: TokenRows | None
    decoder_layers_attr_name: str

    def build_bridge(
        self,
        *,
        vis_dim: int,
        media_token_id: int,
        tile_tag_ids: Sequence[int] = (),
        every: int = 1,
        visibility: Visibility = "immediate",
        perceiver: Mapping[str, Any] | None = None,
        cross_attention: Mapping[str, Any] | None = None,
        new_token_ids: Sequence[int] = (),
        decoder_layers_attr_name: str | None = None,
    ) -> None:
        """Build the bridge between ``vision_encoder`` and ``lang_encoder``, and hook it onto the latter."""
        lm = self.lang_encoder
        self.decoder_layers_attr_name, layers = find_decoder_layers(lm, decoder_layers_attr_name)
        sizes = {"dim": hidden_size(lm.config), "dim_visual": vis_dim, **(cross_attention or {})}
        self.perceiver = PerceiverResampler(dim=vis_dim, **(perceiver or {}))
        self.gated_cross_attn_layers = nn.ModuleList(
            # pyrefly: ignore[bad-argument-type]
            GatedCrossAttentionBlock(**sizes) if (index + 1) % every == 0 else None
            for index in range(len(layers))
        )
        self.conditioning = MediaConditioning(
            media_token_id, visibility, self.gated_cross_attn_layers, tile_tag_ids
        )
        self.conditioning.attach(lm, layers)
        self.token_rows = TokenRows(new_token_ids, lm) if new_token_ids else None
        if self.token_rows is not None:
            self.token_rows.attach(lm, self.conditioning)

    def media_for(
        self,
        input_ids: Tensor | None,
        inputs: MediaInput | None,
        cache: object | None = None,
        documents: Tensor | None = None,
    ) -> Media:
        """Return the media for ``input_ids`` (R, T), the tokens that follow those in ``cache``.

        inputs: the media of the whole text so far, or of the new tokens alone if those of the cached part are
        stored; None for held or stored media, or for plain text. documents (R, T): the document of each
        token, for packed rows. Raises UserError if text and images do not match.
        """
        if input_ids is None:
            raise UserError(
                "forward: got no input_ids, where a Flamingo finds its media; pass the text as token ids"
            )
        is_media = input_ids == self.conditioning.media_token_id
        mentioned, seen = is_media.sum(-1), self.media_in_cache(input_ids, cache)
        past = past_of(cache) if cache_length(cache) else None
        if inputs is None:
            return self._known_media(mentioned, seen, None if past is None else past.media)
        if len(inputs.frames) != len(input_ids):
            raise UserError(
                f"forward: got {len(inputs.frames)} rows of images for {len(input_ids)} of text; "
                "pass one each"
            )
        if past is not None and seen.any() and cover_new_tokens_only(seen, mentioned, inputs.slots):
            positions = media_positions(seen, inputs.slots)
            new = encode_media(self.vision_encoder, self.perceiver, inputs, mentioned, positions)
            return extend(past, seen, new)
        positions = None if documents is None else positions_in_documents(is_media, documents, inputs.slots)
        return encode_media(self.vision_encoder, self.perceiver, inputs, seen + mentioned, positions)

    def media_in_cache(self, input_ids: Tensor, cache: object | None) -> Tensor:
        """Return the number of media tokens (R,) in a key/value cache for each row of ``input_ids`` (R, T)"""
        length, past = cache_length(cache), past_of(cache)
        if past is None or not length:
            return input_ids.new_zeros(len(input_ids))
        return repeat_rows(past.counts_at(length), len(input_ids))

    def _known_media(self, mentioned: Tensor, seen: Tensor, cached: Media | None) -> Media:
        known = self.conditioning.held or cached
        check_counts(mentioned + seen, 0 if known is None else int(known.counts.max()))
        return known or no_media(self.perceiver, mentioned)

    def condition_on(
        self,
        input_ids: Tensor | None,
        inputs: MediaInput | None,
        cache: object | None = None,
        documents: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Return a context in which the language model sees the media of ``input_ids``, for one forward."""
        self.follow_language_model()
        return self.conditioning.open(self.media_for(input_ids, inputs, cache, documents), documents)

    def follow_language_model(self) -> None:
        """Hook the rows of new tokens onto the embedding and output head that the language model has now."""
        if self.token_rows is not None:
            self.token_rows.follow(self.lang_encoder)

    @torch.no_grad()
    def generate_text(self, input_ids: Tensor | None, inputs: MediaInput | None, **kwargs: Any) -> Any:
        """Run the language model's own ``generate``; each medium is encoded and projected once."""
        if input_ids is None:
            raise UserError(
                "generate: got no input_ids, where a Flamingo finds its media; pass the prompt as token ids"
            )
        cache, mask = get_cache(kwargs), kwargs.get("attention_mask")
        _refuse_assisted_continuation(kwargs, cache)
        # A longer mask: the cached tokens were not passed again.
        only_new = mask is not None and mask.shape[1] > input_ids.shape[1]
        new_ids = input_ids if only_new else input_ids[:, cache_length(cache) :]
        media = self.media_for(new_ids, inputs, cache)
        self.follow_language_model()
        no_media_token = NoMediaToken(self.conditioning.input_only_ids, device=str(input_ids.device))
        kwargs["logits_processor"] = LogitsProcessorList(
            [*(kwargs.get("logits_processor") or []), no_media_token]
        )
        if getattr(self.lang_encoder.config, "output_router_logits", False):
            # Trainers enable it for mixtures of experts, whose load-balancing loss fails with a cache.
            kwargs.setdefault("output_router_logits", False)
        with ExitStack() as opened:
            opened.enter_context(self.conditioning.open(media))
            assistant = kwargs.get("assistant_model")
            if isinstance(assistant, FlamingoCore):
                opened.enter_context(assistant.condition_on(input_ids, inputs))
                kwargs["assistant_model"] = assistant.lang_encoder
            # pyrefly: ignore[not-callable]
            return self.lang_encoder.generate(input_ids, **name_cache(self.lang_encoder, kwargs))

    @torch.no_grad()
    def hold_media(self, input_ids: Tensor, inputs: MediaInput | None) -> None:
        """Encode ``inputs`` once, without gradients, for every forward until `uncache_media`."""
        self.conditioning.release()
        media = self.media_for(input_ids, inputs)
        self.conditioning.hold(media, (input_ids == self.conditioning.media_token_id).sum(-1))

    def uncache_media(self) -> None:
        """Drop the media kept by ``cache_media``."""
        self.conditioning.release()


def _refuse_assisted_continuation(options: Mapping[str, Any], cache: object | None) -> None:
    """Raise UserError for assisted decoding from a filled cache.

    transformers 5.24 would process cached tokens twice.
    """
    lookup = getattr(options.get("generation_config"), "prompt_lookup_num_tokens", None)
    lookup = options.get("prompt_lookup_num_tokens", lookup)
    assisted = options.get("assistant_model") is not None or lookup is not None
    if assisted and cache_length(cache):
        raise UserError(
            f"generate: assisted decoding cannot continue from a cache, got one of {cache_length(cache)} "
            "tokens; pass the whole text without a cache, or no assistant"
        )
