"""Media, from what the caller passes to `Media`: checked input, the frozen tower, the perceiver resampler.

Shapes: B samples, M media, F frames, C channels, H height, W width, V visual tokens, L latents, D width, T text
tokens. N media or images, over all samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flamingo_ft.backbones.tower import spatial_tokens
from flamingo_ft.errors import UserError

from .conditioning import Media, Past, documents_of_media, repeat_rows
from .perceiver import PerceiverResampler


@dataclass(frozen=True, eq=False)
class MediaInput:
    """The frames of all media, pixels (B, M, F, C, H, W) or the tower's tokens (B, M, F, V, D), checked.

    counts (B, M): how many of the F frames each medium has; None for all. The rest of F is padding.
    """

    frames: Tensor
    are_tokens: bool
    counts: Tensor | None = None

    @property
    def slots(self) -> int:
        """M."""
        return self.frames.shape[1]

    def of(self, real: Tensor) -> tuple[Tensor, list[int]]:
        """The frames (N, ...) of the media that are ``real`` (B, M), and how many each of these media has."""
        media, most = self.frames[real], self.frames.shape[2]
        if self.counts is None:
            return media.flatten(0, 1), [most] * len(media)
        counts = self.counts.to(real.device)[real]
        found = counts.tolist()
        if min(found) < 1 or max(found) > most:
            wrong = next(count for count in found if not 1 <= count <= most)
            raise UserError(
                f"frame_counts: found {wrong} frames of a medium, wanted 1 to {most}; correct the count"
            )
        present = torch.arange(most, device=counts.device) < counts[:, None]
        return media[present.to(media.device)], found


def media_input(
    pixel_values: Tensor | None, vision_tokens: Tensor | None = None, frame_counts: Tensor | None = None
) -> MediaInput | None:
    """pixel_values (B, M, [F,] C, H, W) or vision_tokens (B, M, F, V, D), with frame_counts (B, M); None without both.

    Raises UserError for both at once and for another shape.
    """
    if pixel_values is not None and vision_tokens is not None:
        raise UserError(
            "found both pixel_values and vision_tokens; the tokens stand for the images: give one"
        )
    if pixel_values is None and vision_tokens is None:
        return None
    frames = _frames_of_pixels(pixel_values) if vision_tokens is None else _frames_of_tokens(vision_tokens)
    if frame_counts is not None and frame_counts.shape != frames.shape[:2]:
        wanted = tuple(frames.shape[:2])
        raise UserError(
            f"frame_counts have shape {tuple(frame_counts.shape)}, wanted {wanted}; give one per medium"
        )
    return MediaInput(frames, vision_tokens is not None, frame_counts)


def _frames_of_pixels(pixels: Tensor) -> Tensor:
    if pixels.dim() not in (5, 6):
        raise UserError(
            f"pixel values have shape {tuple(pixels.shape)}; wanted (samples, media, channels, height, width), "
            "or with frames after media; add the missing axes"
        )
    return pixels[:, :, None] if pixels.dim() == 5 else pixels


def _frames_of_tokens(tokens: Tensor) -> Tensor:
    if tokens.dim() != 5:
        wanted = "(samples, media, frames, tokens, width)"
        raise UserError(
            f"vision tokens have shape {tuple(tokens.shape)}; wanted {wanted}; add the missing axes"
        )
    return tokens


def encode_media(
    vision: nn.Module,
    perceiver: PerceiverResampler,
    given: MediaInput,
    counts: Tensor,
    positions: Tensor | None = None,
) -> Media:
    """Encode the first ``counts`` (B,) media of each sample of ``given``; the rest is padding.

    positions (B, M): of each medium among those of its sample (of its document, where rows hold several), 0-based; by
    default its index along M. Padding never reaches the tower, nor do copies of an image. Media are resampled with
    those that have as many frames. Raises UserError when ``counts`` ask for more than there are.
    """
    check_counts(counts, given.slots)
    real = torch.arange(given.slots, device=counts.device) < counts[:, None]
    if not real.any():
        return no_media(perceiver, counts)
    frames, lengths = given.of(real)
    tokens = frames if given.are_tokens else tokens_of_distinct(vision, frames)
    encoded = _resample(
        perceiver, tokens, lengths, real.nonzero()[:, 1] if positions is None else positions[real]
    )
    latents = encoded.new_zeros(*real.shape, *encoded.shape[1:])
    latents[real] = encoded
    return Media(latents, counts)


def tokens_of_distinct(vision: nn.Module, images: Tensor) -> Tensor:
    """The tower's tokens (N, V, D) of images (N, C, H, W), each encoded once however often it is there."""
    first, source = find_copies(images)
    if len(first) == len(images):
        return spatial_tokens(vision, images)
    return spatial_tokens(vision, images[first])[source]


def _resample(perceiver: PerceiverResampler, tokens: Tensor, lengths: list[int], slots: Tensor) -> Tensor:
    """Latents (N, L, D) of N media from the tokens of all their frames; lengths and slots (N,) are of each medium."""
    if len(set(lengths)) == 1:
        return perceiver(tokens.unflatten(0, (len(lengths), -1))[None], slots[None])[0]
    media, encoded, order = tokens.split(lengths), [], []
    for length in sorted(set(lengths)):
        group = [index for index, found in enumerate(lengths) if found == length]
        together = torch.stack([media[index] for index in group])
        encoded.append(perceiver(together[None], slots[group][None])[0])
        order += group
    return torch.cat(encoded)[torch.tensor(order, device=tokens.device).argsort()]


def media_positions(before: Tensor, slots: int) -> Tensor:
    """Positions (B, slots) of media that follow ``before`` (B,) others of the same sample."""
    return before[:, None] + torch.arange(slots, device=before.device)


def positions_in_documents(is_media: Tensor, documents: Tensor, slots: int) -> Tensor:
    """Positions (B, slots) of media within their documents: is_media and documents (B, T), as in `Media.visible`."""
    owner = documents_of_media(is_media.cumsum(-1), is_media, documents, slots)
    earlier = torch.ones(slots, slots, dtype=torch.bool, device=owner.device).tril(-1)
    return ((owner[:, :, None] == owner[:, None]) & earlier).sum(-1)


def no_media(perceiver: PerceiverResampler, counts: Tensor) -> Media:
    """The media of a batch of plain text, with ``counts`` (B,) of zeros.

    While training, an unseen dummy goes through the bridge in their place, so that every parameter takes part in
    every step and on every rank; of a sharded bridge always, for other ranks gather its weights.
    """
    if not torch.is_grad_enabled() and not isinstance(perceiver, FSDPModule):
        return Media(None, counts)
    width = perceiver.norm.normalized_shape[0]
    return Media(perceiver(torch.zeros(len(counts), 1, 1, 1, width, device=counts.device)), counts)


def extend(past: Past, seen: Tensor, new: Media) -> Media:
    """The media of ``past``, of which each sample has mentioned ``seen`` (B,), followed by ``new``."""
    if past.media.latents is None:
        return new
    if new.latents is None:
        return past.media
    counts, remembered = seen + new.counts, repeat_rows(past.media.latents, len(seen))
    latents = new.latents.new_zeros(len(counts), int(counts.max()), *new.latents.shape[2:])
    for row, (old, added) in enumerate(zip(seen.tolist(), new.counts.tolist(), strict=True)):
        latents[row, :old] = remembered[row, :old]
        latents[row, old : old + added] = new.latents[row, :added]
    return Media(latents, counts)


def are_of_the_end(seen: Tensor, mentioned: Tensor, given: int) -> bool:
    """Whether ``given`` slots of media go with the new tokens alone, which mention (B,), rather than with those
    ``seen`` (B,) before as well. Raises UserError where it could be either."""
    whole, end = int((seen + mentioned).max()), int(mentioned.max())
    if given == whole == end:
        raise UserError(
            f"cannot tell whether the {given} images of each row are those of the whole text or of its end; "
            "continue these rows one by one"
        )
    return given < whole


def check_counts(mentioned: Tensor, given: int) -> None:
    """Refuse text that mentions more media, (B,), than the ``given`` slots hold."""
    most = int(mentioned.max())
    if most > given:
        row = int(mentioned.argmax())
        raise UserError(
            f"row {row} has {most} <image> tokens but {given} image{'s' * (given != 1)}; "
            "add the missing images or remove markers"
        )


# Bits are compared, not numbers: their sum does not depend on the order of summation, and NaN equals itself.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_copies(images: Tensor) -> tuple[list[int], list[int]]:
    """For images (N, ...): the indices (K,) of the different ones, and for each of the N its number among these."""
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
