"""Who sees which media: the one owner of everything a language model's forward needs to know about images.

The language model stays as it is. Hooks on it open onto a `MediaConditioning`, which does nothing until a forward or a
generation opens a `Media`, and forgets it afterwards, after an error too. Which image a token looks at follows from
its *text time*, the number of media tokens up to it. Text times of past tokens belong to the key/value cache, so they
are kept on it and found by its length: what crops, copies or continues a cache carries them along.

Shapes: B samples, R rows of text (B times beams or returned sequences), T tokens of this forward, S tokens so far,
M media, L latents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from flamingo_ft.backbones.decoder_layers import residual_streams

Visibility = Literal["immediate", "all_preceding", "following"]

# Where families keep the past: all but a few (``state``) under the first name, before transformers 5.24 under the others.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state")


@dataclass(eq=False)
class Media:
    """The media of B samples, encoded: made once for a forward, a generation, or a cache of prompts.

    latents (B, M, L, D), or None where the whole batch is text; counts (B,) how many of the M each sample has;
    keys_values: the projections of the latents per decoder layer (and whether under autocast), filled in as
    inference first needs them.
    """

    latents: Tensor | None
    counts: Tensor
    keys_values: dict[tuple[int, bool], list[Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> Media:
        """Shared, not copied: copies of a cache (one prompt, many continuations) look at the same images."""
        return self

    def visible(
        self, times: Tensor, is_media: Tensor, visibility: Visibility, documents: Tensor | None = None
    ) -> Tensor | None:
        """Which media each token sees, by its text time: times, is_media (R, T) -> (R, T, M) bool.

        Where rows hold several documents (R, T), a token sees those of its own alone.
        """
        if self.latents is None:
            return None
        slot = torch.arange(1, self.latents.shape[1] + 1, device=times.device)
        target = (times + ~is_media if visibility == "following" else times)[..., None]
        seen = slot <= target if visibility == "all_preceding" else slot == target
        counts = repeat_rows(self.counts, len(times))
        seen = seen & (slot <= counts[:, None, None])
        if documents is None:
            return seen
        return seen & (
            documents[..., None] == documents_of_media(times, is_media, documents, len(slot))[:, None]
        )


def documents_of_media(times: Tensor, is_media: Tensor, documents: Tensor, slots: int) -> Tensor:
    """The document that each of ``slots`` media stands in, by its media token: (R, T) thrice -> (R, slots)."""
    places = torch.where(is_media, times - 1, slots).clamp(
        max=slots
    )  # all other tokens write into one slot more
    return documents.new_zeros(len(documents), slots + 1).scatter(1, places, documents)[:, :slots]


@dataclass(eq=False)
class Past:
    """What a key/value cache knows of media: theirs, and the text time (R, S) of every token that it holds."""

    media: Media
    times: Tensor

    def counts_at(self, length: int) -> Tensor:
        """Media tokens (R,) among the first ``length`` tokens."""
        return self.times[:, :length].amax(-1) if length else self.times.new_zeros(len(self.times))


@dataclass(eq=False)
class _Call:
    """One forward of the language model: text times up to its last token (R, S), what its T tokens see (R, T, M)."""

    times: Tensor
    visible: Tensor | None


def past_of(cache: object | None) -> Past | None:
    """The media that a key/value cache was filled under, if any."""
    return getattr(cache, "flamingo_past", None)


def cache_length(cache: object | None) -> int:
    """Tokens that a key/value cache holds; state-space caches cannot tell, but carry the text times of theirs."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        past = past_of(cache)
        return 0 if past is None else past.times.shape[1]


def cache_in(values: Mapping[str, object] | tuple) -> object | None:
    """The key/value cache among a forward's keyword arguments or a model's outputs."""
    if isinstance(values, Mapping):
        kept = (value for name, value in values.items() if name in CACHE_ARGUMENTS)
        return next((value for value in kept if value is not None), None)
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


class MediaConditioning:
    """Runs the gated cross-attention blocks inside an untouched language model while a `Media` is open."""

    def __init__(self, media_token_id: int, visibility: Visibility, blocks: nn.ModuleList):
        self.media_token_id = media_token_id
        self.visibility = visibility
        self.blocks = blocks
        self.held: Media | None = None
        self._held_times: Tensor | None = None
        self._now = _Now()

    def attach(self, lm: nn.Module, layers: nn.ModuleList) -> None:
        """Hook ``lm`` and those of its decoder ``layers`` that have a block before them."""
        self._streams = residual_streams(lm.config)
        lm.register_forward_pre_hook(self._before_language_model, with_kwargs=True)
        lm.register_forward_hook(self._after_language_model, with_kwargs=True)
        for index, block in enumerate(self.blocks):
            if block is not None:
                layers[index].register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)

    @property
    def is_open(self) -> bool:
        """Whether the language model is being run as part of a Flamingo."""
        return self._now.media is not None

    @contextmanager
    def open(self, media: Media, documents: Tensor | None = None) -> Iterator[None]:
        """Condition the language model on ``media`` inside the block, and only there.

        documents (R, T): which tokens belong together, where a row holds several documents.
        """
        now = self._now
        outer = now.media, now.call, now.past, now.documents
        now.media, now.call, now.past, now.documents = media, None, None, documents
        try:
            yield
        finally:
            now.media, now.call, now.past, now.documents = outer

    def hold(self, media: Media, times: Tensor) -> None:
        """Keep ``media`` until `release`; later text without media tokens starts at text time ``times`` (B,)."""
        self.held, self._held_times = media, times

    def release(self) -> None:
        """Forget held media."""
        self.held = self._held_times = None

    def start(self, input_ids: Tensor, cache: object | None) -> None:
        """Work out what the tokens of one forward, input_ids (R, T) after those in ``cache``, are looking at."""
        media, documents = self._now.media, self._now.documents
        is_media = input_ids == self.media_token_id
        before, start = self._times_before(media, is_media, cache)
        times = start[:, None] + is_media.cumsum(-1)
        visible = media.visible(times, is_media, self.visibility, documents)
        self._now.call = _Call(torch.cat([before, times], dim=1), visible)

    def finish(self, cache: object | None) -> None:
        """End one forward; what it learned of text times goes with the cache that it filled."""
        self._now.past = Past(self._now.media, self._now.call.times)
        if hasattr(cache, "__dict__"):
            cache.flamingo_past = self._now.past
        self._now.call = None

    def _times_before(self, media: Media, is_media: Tensor, cache: object | None) -> tuple[Tensor, Tensor]:
        """Text times of the tokens in the cache (R, S), and the one at which this forward starts (R,)."""
        rows, length, past = len(is_media), cache_length(cache), past_of(cache)
        if cache is not None and not hasattr(
            cache, "__dict__"
        ):  # a bare list (RWKV): the previous forward filled it
            past = self._now.past
            length = 0 if past is None else past.times.shape[1]
        before = is_media.new_zeros(rows, length, dtype=torch.long)
        if past is not None and length:
            known = repeat_rows(past.times, rows)[:, :length]
            before[:, : known.shape[1]] = known
            before[:, known.shape[1] :] = known[
                :, -1:
            ]  # read by the language model on its own: no media in them
            return before, before[:, -1]
        continues = media is self.held and not is_media.any()
        start = repeat_rows(self._held_times, rows) if continues else before.new_zeros(rows)
        return before, start

    # Compiled code would lose what is open in this thread; the language model itself is compiled whole all the same.
    @torch.compiler.disable
    def _before_language_model(self, lm: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.is_open:
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise ValueError(
                "a Flamingo finds its media in input_ids; found none (inputs_embeds alone do not do)"
            )
        self.start(input_ids, cache_in(kwargs))

    @torch.compiler.disable
    def _after_language_model(self, lm: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if self.is_open:
            given = cache_in(kwargs)
            self.finish(cache_in(output) if given is None else given)

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        call, media = self._now.call, self._now.media
        if call is None:
            _refuse_recomputation()
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = self._into_streams(hidden, lambda x: self._cross_attend(index, x, media, call.visible))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _into_streams(self, hidden: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a block on the residual stream; where a family keeps several, on their mean, its change added to each."""
        if self._streams is None:
            return block(hidden)
        mean = self._streams.mean(hidden)
        return self._streams.add(hidden, block(mean) - mean)

    def _cross_attend(self, index: int, hidden: Tensor, media: Media, visible: Tensor | None) -> Tensor:
        """The block of decoder layer ``index``; keys and values are kept for the next token where no gradient is."""
        block = self.blocks[index]
        if media.latents is None or torch.is_grad_enabled():
            return block(block.entry(hidden), media.latents, visible)[0]
        kept = index, torch.is_autocast_enabled(hidden.device.type)
        hidden, *media.keys_values[kept] = block(
            hidden, media.latents, visible, *media.keys_values.get(kept, ())
        )
        return hidden


class _Now(threading.local):
    """What is open in this thread: two threads may generate with one model. A copy starts with nothing open."""

    media: Media | None = None
    call: _Call | None = None
    past: Past | None = None
    documents: Tensor | None = None

    def __reduce__(self) -> tuple:
        return _Now, ()


def _refuse_recomputation() -> None:
    """A layer run inside a backward, with nothing open: some wrapper recomputes it with its hooks, too late."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a decoder layer is recomputed from outside, where the bridge gets no gradient; "
            "use the model's activation_checkpointing_enable() instead of a checkpoint wrapper"
        )


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """Each of the B rows of ``x`` as often as text has rows for it: (B, ...) -> (rows, ...)."""
    if rows % len(x):
        raise ValueError(
            f"found {rows} rows of text for {len(x)} rows of media; give each row of text its media"
        )
    return x.repeat_interleave(rows // len(x), dim=0)
