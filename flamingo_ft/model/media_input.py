"""What a caller shows the model: pixels, or the frozen tower's tokens of them.

Shapes: B samples, M media, F frames, C channels, H height, W width, V visual tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flamingo_ft.errors import UserError


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
