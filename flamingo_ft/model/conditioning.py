"""The hooks through which tokens see media: the one owner of the media state of a language model's forward.

Hooks on the unchanged language model call a `MediaConditioning`, which does nothing until a forward or a
generation opens a `Media`, and which drops it afterwards, also after an error. Which image a token attends to
follows from its *text time*, the number of media tokens up to and including it. Text times of past tokens are
stored on the key/value cache and cut to its length, so cropping, copying or continuing a cache carries them
along.

Shapes: B samples, R rows of text (B times beams or returned sequences), T tokens of this forward, S tokens so
far, M media, L latents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flamingo_ft.backbones.decoder_layers import residual_streams

from .compat import in_backward
from .language_model_inputs import get_cache
from .sight import Media, Sight, Visibility, repeat_rows
from .tile_tags import tag_of_tokens


@dataclass(eq=False)
class Past:
    """State stored on a key/value cache: the media it was filled with, and its tokens' text times (R, S)."""

    media: Media
    times: Tensor

    def counts_at(self, length: int) -> Tensor:
        """Return the number of media tokens (R,) among the first ``length`` tokens."""
        return self.times[:, :length].amax(-1) if length else self.times.new_zeros(len(self.times))


@dataclass(eq=False)
class _Call:
    """One forward of the language model.

    times (R, S): text times up to its last token. sight: what its T tokens see, None for plain text.
    """

    times: Tensor
    sight: Sight | None


def past_of(cache: object | None) -> Past | None:
    """Return the media state stored on a key/value cache, if any."""
    return getattr(cache, "flamingo_past", None)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Replace the rows of a key/value cache by a choice of them, any number of times each: rows (R,).

    Every sample must be chosen equally often, and its rows stand together.
    """
    cache.reorder_cache(rows)
    past = past_of(cache)
    if past is not None:
        cache.flamingo_past = Past(past.media, past.times[rows])


def cache_length(cache: Any) -> int:
    """Return the number of tokens in a cache; for state-space caches, the number of stored text times."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        past = past_of(cache)
        return 0 if past is None else past.times.shape[1]


class MediaConditioning:
    """Runs the gated cross-attention blocks inside an unchanged language model while a `Media` is open."""

    def __init__(
        self,
        media_token_id: int,
        visibility: Visibility,
        blocks: nn.ModuleList,
        tile_tag_ids: Sequence[int] = (),
    ):
        self.media_token_id = media_token_id
        self.tile_tag_ids = tuple(tile_tag_ids)
        self.visibility = visibility
        self.blocks = blocks
        self.held: Media | None = None
        self._held_times: Tensor | None = None
        self._now = _Now()

    def attach(self, lm: PreTrainedModel, layers: nn.ModuleList) -> None:
        """Register hooks on ``lm`` and on the decoder ``layers`` that have a block before them."""
        self._streams = residual_streams(lm.config)
        lm.register_forward_pre_hook(self._before_language_model, with_kwargs=True)
        lm.register_forward_hook(self._after_language_model, with_kwargs=True)
        for index, block in enumerate(self.blocks):
            if block is not None:
                layers[index].register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)

    @property
    def input_only_ids(self) -> list[int]:
        """The tokens that belong to an input image, which are never generated."""
        return [self.media_token_id, *self.tile_tag_ids]

    @property
    def is_open(self) -> bool:
        """Return whether the language model is being run as part of a Flamingo."""
        return self._now.media is not None

    @contextmanager
    def open(self, media: Media, documents: Tensor | None = None) -> Generator[None]:
        """Condition the language model on ``media`` inside the ``with`` block, and only there.

        documents (R, T): the document of each token, for packed rows.
        """
        now = self._now
        outer = now.media, now.call, now.past, now.documents
        now.media, now.call, now.past, now.documents = media, None, None, documents
        try:
            yield
        finally:
            now.media, now.call, now.past, now.documents = outer

    def hold(self, media: Media, times: Tensor) -> None:
        """Keep ``media`` until `release`; later text without media starts at text time ``times`` (B,)."""
        self.held, self._held_times = media, times

    def release(self) -> None:
        """Drop held media."""
        self.held = self._held_times = None

    def start(self, input_ids: Tensor, cache: Any) -> None:
        """Compute which media input_ids (R, T) of one forward see; they follow the tokens in ``cache``."""
        media, documents = self._now.media, self._now.documents
        assert media is not None, "called while nothing is open"
        is_media = input_ids == self.media_token_id
        before, start = self._times_before(media, is_media, cache)
        times = start[:, None] + is_media.cumsum(-1)
        tags = tag_of_tokens(input_ids, self.tile_tag_ids) if self.tile_tag_ids else None
        sight = media.sight(times, is_media, self.visibility, documents, tags=tags)
        self._now.call = _Call(torch.cat([before, times], dim=1), sight)

    def finish(self, cache: Any) -> None:
        """End one forward and store its media and text times on the cache that it filled."""
        media, call = self._now.media, self._now.call
        assert media is not None and call is not None, "called while nothing is open"
        self._now.past = Past(media, call.times)
        if hasattr(cache, "__dict__"):
            cache.flamingo_past = self._now.past
        self._now.call = None

    def _times_before(self, media: Media, is_media: Tensor, cache: object | None) -> tuple[Tensor, Tensor]:
        """Return the text times (R, S) of the cached tokens, and those (R,) at which this forward starts."""
        rows, length, past = len(is_media), cache_length(cache), past_of(cache)
        # RWKV's cache is a plain list, filled by the previous forward.
        if cache is not None and not hasattr(cache, "__dict__"):
            past = self._now.past
            length = 0 if past is None else past.times.shape[1]
        before = is_media.new_zeros(rows, length, dtype=torch.long)
        if past is not None and length:
            known = repeat_rows(past.times, rows)[:, :length]
            before[:, : known.shape[1]] = known
            # Tokens beyond were read by the language model on its own, without media.
            before[:, known.shape[1] :] = known[:, -1:]
            return before, before[:, -1]
        if media is self.held and self._held_times is not None and not is_media.any():
            return before, repeat_rows(self._held_times, rows)
        return before, before.new_zeros(rows)

    # Not compiled: torch.compile would not see this thread's state. The language model itself still compiles
    # in one graph.
    @torch.compiler.disable
    def _before_language_model(self, lm: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.is_open:
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise ValueError(
                "forward: got no input_ids, where a Flamingo finds its media; pass them, not inputs_embeds"
            )
        self.start(input_ids, get_cache(kwargs))

    @torch.compiler.disable
    def _after_language_model(self, lm: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.is_open:
            cache = get_cache(kwargs)
            self.finish(get_cache(output) if cache is None else cache)

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        call, media = self._now.call, self._now.media
        if call is None or media is None:
            _refuse_recomputation()
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = self._into_streams(hidden, lambda x: self._cross_attend(index, x, media, call.sight))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _into_streams(self, hidden: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a block on the residual stream; of several streams, on their mean, its change added to each."""
        if self._streams is None:
            return block(hidden)
        mean = self._streams.mean(hidden)
        return self._streams.add(hidden, block(mean) - mean)

    def _cross_attend(self, index: int, hidden: Tensor, media: Media, sight: Sight | None) -> Tensor:
        """Run the block before decoder layer ``index``; without gradients, keep its keys and values."""
        block: Any = self.blocks[index]
        if sight is not None:
            # In generate, layers that reuse the keys and values of others (Gemma 4) get the last token only.
            sight = sight.last(hidden.shape[1])
        if media.latents is None or torch.is_grad_enabled():
            return block(block.entry(hidden), media.latents, sight)[0]
        key = index, torch.is_autocast_enabled(hidden.device.type)
        hidden, *keys_values = block(hidden, media.latents, sight, *media.keys_values.get(key, ()))
        media.keys_values[key] = keys_values
        return hidden


class _Now(threading.local):
    """The open state of this thread: several threads may generate with one model. A copy starts closed."""

    media: Media | None = None
    call: _Call | None = None
    past: Past | None = None
    documents: Tensor | None = None

    def __reduce__(self) -> tuple:
        return _Now, ()


def _refuse_recomputation() -> None:
    """Raise RuntimeError in a backward pass, where a checkpoint wrapper recomputes a layer with its hooks."""
    if in_backward():
        raise RuntimeError(
            "a checkpoint wrapper recomputes a decoder layer together with its hooks, and the bridge would "
            "get no gradient; use the model's activation_checkpointing_enable() instead"
        )
