"""The encoded media of a batch, and which of them each token sees.

With `immediate` and `following` visibility a token sees one medium at most. Tokens are then grouped by it and
attend to its latents alone, mostly without a mask: the work grows with the text, not with text times media.

Shapes: B samples, R rows of text (B times beams or returned sequences), T tokens of this forward, M media, L
latents, D their width; N tokens of a group, G media that they see, S tokens that see one medium.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Visibility = Literal["immediate", "all_preceding", "following"]


@dataclass(eq=False)
class Media:
    """The encoded media of B samples, made once per forward or generation, or for a cached prompt.

    latents (B, M, L, D), None if the whole batch is text; counts (B,): how many of the M each sample has;
    lengths (B, M): how many of the L each medium has, the rest being padding, None if all have L; tags (B, M,
    L): which text tag of tiles sees each latent (`tile_tags`), None if each medium is one view;
    keys_values: the projected latents per decoder layer and autocast state, filled in by inference on first
    use.
    """

    latents: Tensor | None
    counts: Tensor
    lengths: Tensor | None = None
    tags: Tensor | None = None
    keys_values: dict[tuple[int, bool], list[Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> Media:
        """Return self: copies of a cache (one prompt, many continuations) share their media."""
        return self

    def sight(
        self,
        times: Tensor,
        is_media: Tensor,
        visibility: Visibility,
        documents: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> Sight | None:
        """Return what each token sees, from text times and media-token mask (R, T); None for plain text.

        documents (R, T): in packed rows, the document of each token; a token sees only media of its own
        document. tags (R, T): which text tag of tiles each token is, -1 for none; a tag sees its view of the
        medium before it.
        """
        if self.latents is None:
            return None
        slot = torch.arange(1, self.latents.shape[1] + 1, device=times.device)
        target = (times + ~is_media if visibility == "following" else times)[..., None]
        seen = slot <= target if visibility == "all_preceding" else slot == target
        if tags is not None:
            seen = torch.where((tags >= 0)[..., None], slot == times[..., None], seen)
        counts = repeat_rows(self.counts, len(times))
        seen = seen & (slot <= counts[:, None, None])
        if documents is not None:
            owner = documents_of_media(times, is_media, documents, len(slot))
            seen = seen & (documents[..., None] == owner[:, None])
        return Sight(self, seen, tags, one_medium=visibility != "all_preceding")


def documents_of_media(times: Tensor, is_media: Tensor, documents: Tensor, slots: int) -> Tensor:
    """Return the document (R, slots) that the media token of each medium is in; the arguments are (R, T)."""
    # Text tokens write to a spare slot, which is cut off.
    index = torch.where(is_media, times - 1, slots).clamp(max=slots)
    return documents.new_zeros(len(documents), slots + 1).scatter(1, index, documents)[:, :slots]


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat each row of ``x`` for the beams or sequences of its sample: (B, ...) -> (rows, ...)."""
    if rows % len(x):
        raise ValueError(
            f"got {rows} rows of text for {len(x)} rows of media; pass the media of each row of text"
        )
    return x.repeat_interleave(rows // len(x), dim=0)


@dataclass(eq=False)
class Group:
    """Tokens that attend in one call, padded: those of media that about equally many tokens see.

    tokens (N,): their indices among the R * T, medium by medium, on the host. media: the G indices among the
    B * M, as a slice if they are equally spaced. count: G. real (G, S): which of the padded tokens are not
    padding, None for all. mask (G, 1, S or 1, L): which latents each sees, None for all.
    """

    tokens: Tensor
    media: Tensor | slice
    count: int
    real: Tensor | None = None
    mask: Tensor | None = None

    def pad(self, values: Tensor) -> Tensor:
        """Return the values (N, ...) of the tokens by medium, (G, S, ...); those of padding are arbitrary."""
        if self.real is None:
            return values.unflatten(0, (self.count, -1))
        place = self.real.flatten().cumsum(0).sub(1).clamp(min=0)
        return values[place].unflatten(0, self.real.shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """Invert `pad`."""
        return padded.flatten(0, 1) if self.real is None else padded[self.real]


@dataclass(eq=False)
class Sight:
    """What the tokens of one forward see.

    seen (R, T, M): which media. tags (R, T): which text tag of tiles each token is, -1 for none; None without
    tags. one_medium: whether each token sees one at most.
    """

    media: Media
    seen: Tensor
    tags: Tensor | None
    one_medium: bool

    def last(self, tokens: int) -> Sight:
        """Return what the last ``tokens`` of each row see."""
        if tokens == self.seen.shape[1]:
            return self
        seen, tags = self.seen[:, -tokens:], None if self.tags is None else self.tags[:, -tokens:]
        if seen.shape[1] == 1:  # transformers' RWKV makes B tokens of one when it continues B rows
            seen = seen.expand(-1, tokens, -1)
            tags = None if tags is None else tags.expand(-1, tokens)
        return Sight(self.media, seen, tags, self.one_medium)

    @cached_property
    def latents_seen(self) -> Tensor:
        """Which latents each token sees, (R, T, M * L) bool."""
        rows, latents = len(self.seen), self._latents
        place = torch.arange(latents, device=self.seen.device)
        seen = self.seen[..., None].expand(*self.seen.shape, latents)
        if self.media.lengths is not None:
            seen = seen & (place < repeat_rows(self.media.lengths, rows)[:, None, :, None])
        if self.tags is not None:
            tags = None if self.media.tags is None else repeat_rows(self.media.tags, rows)[:, None]
            seen = seen & _in_view(self.tags[:, :, None, None], tags)
        return seen.flatten(2)

    @cached_property
    def tokens(self) -> Tensor | None:
        """The tokens of all groups, one after the other; None if they are all tokens in their order."""
        assert self.groups is not None
        tokens = torch.cat([group.tokens for group in self.groups])
        rows, length, _ = self.seen.shape
        in_order = len(tokens) == rows * length and torch.equal(tokens, torch.arange(rows * length))
        return None if in_order else tokens.to(self.seen.device)

    @cached_property
    def groups(self) -> list[Group] | None:
        """The tokens that see a medium; None if a token may see several, and if no token sees any."""
        if not self.one_medium:
            return None
        return [self._masked(group) for group in self.unmasked_groups()] or None

    def unmasked_groups(self) -> Iterator[Group]:
        """Yield the groups of tokens, each of which sees all latents of its medium."""
        yield from group_tokens(self._seen_medium())

    def _seen_medium(self) -> Tensor:
        """Return the index among the B * M of the medium that each token sees, -1 for none: (R * T,)."""
        rows, _, media = self.seen.shape
        sample = torch.arange(rows, device=self.seen.device) // (rows // len(self.media.counts))
        index = sample[:, None] * media + self.seen.int().argmax(-1)
        return torch.where(self.seen.any(-1), index, -1).flatten()

    def _masked(self, group: Group) -> Group:
        """Give a group its mask, if its media have padding or its tokens are tags."""
        if self.media.lengths is not None:
            lengths = self.media.lengths.flatten()[group.media]
            group.mask = torch.arange(self._latents, device=lengths.device) < lengths[:, None, None, None]
        if self.tags is not None:
            tags = group.pad(self.tags.flatten()[group.tokens.to(self.tags.device)])[:, None, :, None]
            views = self.media.tags
            views = None if views is None else views.flatten(0, 1)[group.media][:, None, None]
            in_view = _in_view(tags, views)
            group.mask = in_view if group.mask is None else group.mask & in_view
        return group

    @property
    def _latents(self) -> int:
        assert self.media.latents is not None
        return self.media.latents.shape[2]


def _in_view(tags: Tensor, views: Tensor | None) -> Tensor:
    """Return which latents each token sees within its medium: a tag those of its view, other tokens all.

    tags (..., 1): -1 for a token that is not a tag; views (..., L): the tag of each latent, None if each
    medium is one view, that of tag 0.
    """
    return tags <= 0 if views is None else (tags < 0) | (views == tags)


def group_tokens(medium: Tensor) -> Iterator[Group]:
    """Yield the groups of tokens (R * T,) by the index of the medium that each sees, -1 for none.

    Media are grouped by the number of tokens that see them, rounded up to a power of two, so that less than
    half of a group is padding.
    """
    device, medium = medium.device, medium.cpu()  # how many groups there are is decided on the host
    tokens = (medium >= 0).nonzero()[:, 0]
    tokens = tokens[medium[tokens].argsort(stable=True)]
    media, counts = medium[tokens].unique_consecutive(return_counts=True)
    starts, sizes = counts.cumsum(0) - counts, counts.double().log2().ceil()
    for size in sizes.unique():
        chosen = (sizes == size).nonzero()[:, 0]
        step = torch.arange(int(counts[chosen].max()))
        real = step < counts[chosen, None]
        group = tokens[(starts[chosen, None] + step)[real]]
        padding = None if real.all() else real.to(device)
        yield Group(group, _as_slice(media[chosen], device), len(chosen), padding)


def _as_slice(indices: Tensor, device: torch.device) -> Tensor | slice:
    """Return ascending indices as a slice, which copies nothing, or else on ``device``."""
    first, last = int(indices[0]), int(indices[-1])
    step = int(indices[1]) - first if len(indices) > 1 else 1
    evenly = torch.equal(indices, torch.arange(first, last + 1, step))
    return slice(first, last + 1, step) if evenly else indices.to(device)
