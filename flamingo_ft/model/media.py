"""From pixels to `Media`: check the input against the text, run the frozen tower and the perceiver resampler.

Shapes: B samples, M media, F frames, C channels, H height, W width, V visual tokens, L latents, D width, T
text tokens; N media or images of all samples together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.errors import UserError

from .conditioning import Past
from .perceiver import PerceiverResampler
from .sight import Media, documents_of_media, repeat_rows
from .tile_tags import tags_of_latents
from .tiles import UNTILED, Grid


@dataclass(frozen=True, eq=False)
class MediaInput:
    """The checked frames of all media: pixels (B, M, F, C, H, W) or the tower's tokens (B, M, F, V, D).

    counts (B, M): the number of frames or views of each medium, the rest of F being padding; None if all have
    F. grids (B, M, 2): rows and columns of the tiles of each image; None if no image is tiled.
    """

    frames: Tensor
    are_tokens: bool
    counts: Tensor | None = None
    grids: Tensor | None = None

    @property
    def slots(self) -> int:
        """M, the media per sample, padding included."""
        return self.frames.shape[1]

    def frames_of(self, real: Tensor) -> tuple[Tensor, list[int]]:
        """Return the frames (N, ...) of the media that are ``real`` (B, M), and each medium's frame count."""
        media, most = self.frames[real], self.frames.shape[2]
        if self.counts is None:
            return media.flatten(0, 1), [most] * len(media)
        counts = self.counts.to(real.device)[real]
        lengths = counts.tolist()
        for length in lengths:
            if not 1 <= length <= most:
                raise UserError(f"frame_counts: must be 1 to {most}, got {length}; correct the count")
        present = torch.arange(most, device=counts.device) < counts[:, None]
        return media[present.to(media.device)], lengths

    def grids_of(self, real: Tensor, lengths: Sequence[int]) -> list[Grid]:
        """Return the grid of each medium that is ``real`` (B, M). lengths: their numbers of views."""
        if self.grids is None:
            return [UNTILED] * len(lengths)
        grids = [(rows, columns) for rows, columns in self.grids.to(real.device)[real].tolist()]
        for (rows, columns), length in zip(grids, lengths, strict=True):
            if (rows, columns) != UNTILED and length - rows * columns not in (0, 1):
                raise UserError(
                    f"tile_grids: {rows} x {columns} tiles have {rows * columns} views, or one more for the "
                    f"whole image, got {length}; pass the grid that the image was divided by"
                )
        return grids


def media_input(
    pixel_values: Tensor | None,
    vision_tokens: Tensor | None = None,
    frame_counts: Tensor | None = None,
    tile_grids: Tensor | None = None,
) -> MediaInput | None:
    """Check the media of a forward: pixel_values (B, M, [F,] C, H, W), vision_tokens (B, M, F, V, D) or None.

    frame_counts (B, M), tile_grids (B, M, 2): as `MediaInput.counts` and `MediaInput.grids`. Raises UserError
    for both at once and for another shape.
    """
    if pixel_values is not None and vision_tokens is not None:
        raise UserError(
            "forward: got both pixel_values and vision_tokens, the tower's output for them; pass one"
        )
    if pixel_values is None and vision_tokens is None:
        return None
    frames = _frames_of_pixels(pixel_values) if vision_tokens is None else _frames_of_tokens(vision_tokens)
    media = tuple(frames.shape[:2])
    if frame_counts is not None and frame_counts.shape != media:
        raise UserError(
            f"frame_counts: must have shape {media}, got {tuple(frame_counts.shape)}; "
            "pass one count per medium"
        )
    if tile_grids is not None and tile_grids.shape != (*media, 2):
        raise UserError(
            f"tile_grids: must have shape {(*media, 2)}, got {tuple(tile_grids.shape)}; "
            "pass rows and columns per medium"
        )
    return MediaInput(frames, vision_tokens is not None, frame_counts, tile_grids)


def _frames_of_pixels(pixels: Tensor) -> Tensor:
    if pixels.dim() not in (5, 6):
        raise UserError(
            "pixel_values: must be (samples, media, channels, height, width), or with frames after media, "
            f"got shape {tuple(pixels.shape)}; add the missing axes"
        )
    return pixels[:, :, None] if pixels.dim() == 5 else pixels


def _frames_of_tokens(tokens: Tensor) -> Tensor:
    if tokens.dim() != 5:
        raise UserError(
            f"vision_tokens: must be (samples, media, frames, tokens, width), got shape "
            f"{tuple(tokens.shape)}; add the missing axes"
        )
    return tokens


def encode_media(
    vision: nn.Module,
    perceiver: PerceiverResampler,
    inputs: MediaInput,
    counts: Tensor,
    positions: Tensor | None = None,
) -> Media:
    """Encode the first ``counts`` (B,) media of each sample of ``inputs``; the rest is padding.

    positions (B, M): 0-based position of each medium in its sample, or in its document in packed rows; by
    default its index along M. Neither padding nor a second copy of an image is run through the tower. Raises
    UserError if ``counts`` exceed the media.
    """
    check_counts(counts, inputs.slots)
    real = torch.arange(inputs.slots, device=counts.device) < counts[:, None]
    if not real.any():
        return no_media(perceiver, counts)
    frames, lengths = inputs.frames_of(real)
    tokens = frames if inputs.are_tokens else encode_distinct(vision, frames)
    slots = real.nonzero()[:, 1] if positions is None else positions[real]
    grids = inputs.grids_of(real, lengths)
    encoded, sizes = _resample(perceiver, tokens, lengths, grids, slots)
    tags = None
    if perceiver.latents is None and any(grid != UNTILED for grid in grids):
        tags = [tags_of_latents(*medium) for medium in zip(lengths, grids, sizes, strict=True)]
    return _place(encoded, sizes, tags, real, counts)


def _place(
    encoded: Tensor, sizes: list[int], tags: Sequence[Tensor] | None, real: Tensor, counts: Tensor
) -> Media:
    """Return the `Media` with the latents (N, L, D) of those that are ``real`` (B, M).

    sizes: how many of the L each of the N media has, the rest being padding. tags: those of its latents.
    """
    media = Media(_at_real(encoded, real), counts)
    if len(set(sizes)) > 1:
        media.lengths = _at_real(counts.new_tensor(sizes), real)
    if tags is not None:
        padded = nn.utils.rnn.pad_sequence([*tags], batch_first=True, padding_value=-1)
        media.tags = _at_real(padded.to(counts.device), real)
    return media


def _at_real(values: Tensor, real: Tensor) -> Tensor:
    """Return values (N, ...) at the N places of ``real`` (B, M), and zeros elsewhere: (B, M, ...)."""
    placed = values.new_zeros(*real.shape, *values.shape[1:])
    placed[real] = values
    return placed


def encode_distinct(vision: nn.Module, images: Tensor) -> Tensor:
    """Return the tower's tokens (N, V, D) of images (N, C, H, W), each distinct image encoded once."""
    first, source = find_copies(images)
    if len(first) == len(images):
        return spatial_tokens(vision, images)
    return spatial_tokens(vision, images[first])[source]


def _resample(
    perceiver: PerceiverResampler, tokens: Tensor, lengths: list[int], grids: list[Grid], slots: Tensor
) -> tuple[Tensor, list[int]]:
    """Return the latents (N, L, D) of N media, from the tokens of all their frames, and how many each has.

    lengths, grids, slots: of each medium. Media with the same number of frames and the same grid are
    resampled together.
    """
    shapes = list(zip(lengths, grids, strict=True))
    if len(set(shapes)) == 1:
        latents = perceiver(tokens.unflatten(0, (len(lengths), -1))[None], slots[None], grids[0])[0]
        return latents, [latents.shape[1]] * len(latents)
    media, encoded = tokens.split(lengths), {}
    for shape in sorted(set(shapes)):
        group = [index for index, one in enumerate(shapes) if one == shape]
        together = torch.stack([media[index] for index in group])
        latents = perceiver(together[None], slots[group][None], shape[1])[0]
        encoded.update(zip(group, latents, strict=True))
    return _pad([encoded[index] for index in range(len(media))])


def _pad(encoded: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Return latents (L, D) of several media as one tensor (N, L, D), and how many each has."""
    return nn.utils.rnn.pad_sequence(encoded, batch_first=True), [len(latents) for latents in encoded]


def media_positions(before: Tensor, slots: int) -> Tensor:
    """Return the positions (B, slots) of media that follow ``before`` (B,) others of their sample."""
    return before[:, None] + torch.arange(slots, device=before.device)


def positions_in_documents(is_media: Tensor, documents: Tensor, slots: int) -> Tensor:
    """Return the positions (B, slots) of media within their documents.

    is_media, documents (B, T): see `Media.sight`.
    """
    owner = documents_of_media(is_media.cumsum(-1), is_media, documents, slots)
    earlier = torch.ones(slots, slots, dtype=torch.bool, device=owner.device).tril(-1)
    return ((owner[:, :, None] == owner[:, None]) & earlier).sum(-1)


def no_media(perceiver: PerceiverResampler, counts: Tensor) -> Media:
    """Return the `Media` of a batch of plain text; counts (B,) are zero.

    With gradients, a masked dummy image goes through the bridge, so that every parameter gets a gradient in
    every step and on every rank; with a sharded bridge always, since the other ranks wait for this one to
    gather the weights.
    """
    if not torch.is_grad_enabled() and not isinstance(perceiver, FSDPModule):
        return Media(None, counts)
    width = perceiver.norm.normalized_shape[0]
    return Media(perceiver(torch.zeros(len(counts), 1, 1, 1, width, device=counts.device)), counts)


def extend(past: Past, seen: Tensor, new: Media) -> Media:
    """Return the media of ``past``, of which each sample has seen the first ``seen`` (B,), then ``new``."""
    if past.media.latents is None:
        return new
    if new.latents is None:
        return past.media
    counts, rows = seen + new.counts, len(seen)
    before, after = _first_media(past.media, seen, rows), _first_media(new, new.counts, rows)
    media = [medium for both in zip(before, after, strict=True) for row in both for medium in row]
    tiled = past.media.tags is not None or new.tags is not None
    real = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    encoded, sizes = _pad([latents for latents, _ in media])
    return _place(encoded, sizes, [tags for _, tags in media] if tiled else None, real, counts)


def _first_media(media: Media, counts: Tensor, rows: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Return latents (L, D) and their tags (L,), without padding, of the first media of each row of text.

    counts (R,): how many. Media in one view have the tag 0.
    """
    assert media.latents is not None
    latents = repeat_rows(media.latents, rows)
    sizes = media.lengths
    if sizes is None:
        sizes = counts.new_full(media.latents.shape[:2], media.latents.shape[2])
    sizes = repeat_rows(sizes, rows).tolist()
    tags = counts.new_zeros(latents.shape[:3]) if media.tags is None else repeat_rows(media.tags, rows)
    return [
        [(latents[row, i, : sizes[row][i]], tags[row, i, : sizes[row][i]]) for i in range(count)]
        for row, count in enumerate(counts.tolist())
    ]


def cover_new_tokens_only(seen: Tensor, mentioned: Tensor, slots: int) -> bool:
    """Return whether the media passed, ``slots`` per row, are those of the new tokens only.

    Otherwise they are those of the whole text. seen, mentioned (B,): media tokens in the cache and among the
    new tokens. Raises UserError if both are possible.
    """
    whole, end = int((seen + mentioned).max()), int(mentioned.max())
    if slots == whole == end:
        raise UserError(
            f"forward: cannot tell whether the {slots} images of each row belong to the whole text or to "
            "the new tokens alone; continue these rows one at a time"
        )
    return slots < whole


def check_counts(mentioned: Tensor, available: int) -> None:
    """Raise UserError if a row of text has more media tokens, (B,), than ``available`` media."""
    most = int(mentioned.max())
    if most > available:
        row = int(mentioned.argmax())
        raise UserError(
            f"row {row} has {most} <image> tokens but {available} image{'s' * (available != 1)}; "
            "add the missing images or remove markers"
        )


# Images are compared bit by bit: integer sums do not depend on the order of summation, and NaN equals itself.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_copies(images: Tensor) -> tuple[list[int], list[int]]:
    """Find the distinct ones among images (N, ...).

    Returns the indices (K,) of their first occurrences, and for each of the N images its place among the K.
    """
    bits = images.contiguous().view(BITS[images.element_size()]).flatten(1)
    first: list[int] = []
    source: list[int] = []
    alike: dict[int, list[int]] = {}
    for index, checksum in enumerate(bits.sum(1, dtype=torch.int64).tolist()):
        candidates = alike.setdefault(checksum, [])
        known = next((number for number in candidates if torch.equal(bits[first[number]], bits[index])), None)
        if known is None:
            known = len(first)
            candidates.append(known)
            first.append(index)
        source.append(known)
    return first, source
