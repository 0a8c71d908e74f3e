"""The images of prompts as model inputs; the frozen tower's tokens of recent ones are kept.

Shapes: B prompts, M media, F frames, C channels, H height, W width, V visual tokens, D width.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.data.media import load_pixels
from flamingo_ft.data.sample import Video
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.download import is_url
from flamingo_ft.model.geometry import Size
from flamingo_ft.model.images import UnreadableImage, to_rgb
from flamingo_ft.model.media import encode_distinct
from flamingo_ft.model.views import Views, stack_media

from .prompts import Prompt

FILES = (str, bytes, os.PathLike, Video)  # images by path, URL or content; others are already decoded


@dataclass(frozen=True, eq=False)
class LoadedMedium:
    """An image or video that was read: its pixels, or the tower's tokens for them if they are kept.

    key: what it is kept under; None where nothing is kept.
    """

    pixels: Views | None = None
    tokens: Views | None = None
    key: Hashable | None = None

    @property
    def image_size(self) -> Size | None:
        """Width and height in pixels of the upright image; None for a video."""
        views = self.tokens if self.pixels is None else self.pixels
        return None if views is None else views.image_size


class MediaInputs:
    """Turns the images of prompts into inputs of the model.

    cache_bytes: how much memory the tower's tokens of recent images may take, so that an image that comes
    again - a demonstration, a turn of a chat - is not encoded again; 0 keeps none.
    """

    def __init__(
        self, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, cache_bytes: int = 0
    ):
        self._model, self._processor, self._cache_bytes = model, processor, cache_bytes
        self._kept: OrderedDict[Hashable, Views] = OrderedDict()  # tokens, the latest used last
        self._kept_bytes = 0

    def of(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Return pixel_values (B, M, [F,] C, H, W) or, with a cache, vision_tokens (B, M, F, V, D).

        frame_counts (B, M) and tile_grids (B, M, 2) are there where media differ in their views
        (`stack_media`); {} for prompts without images. Raises UserError as `load` does.
        """
        if not self._cache_bytes:
            return self.pixels_of(prompts)
        rows = [self.load(prompt) for prompt in prompts]
        tokens = self._tokens_of([medium for row in rows for medium in row])
        inputs = stack_media([[tokens[medium.key] for medium in row] for row in rows], "vision_tokens")
        if inputs and inputs["vision_tokens"].dim() == 4:
            inputs["vision_tokens"] = inputs["vision_tokens"][:, :, None]
        return inputs

    def pixels_of(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Return `of` without the cache: always pixel_values."""
        return stack_media([[self._pixels(image, p.where) for image in p.images] for p in prompts])

    def load(self, prompt: Prompt) -> list[LoadedMedium]:
        """Read the images of a prompt; those that are read already, or whose tokens are kept, are not again.

        Raises UserError, beginning with the prompt's ``where``, for an image that cannot be read.
        """
        return [self._loaded(image, prompt.where) for image in prompt.images]

    def clear(self) -> None:
        """Forget all tokens: the tower has changed."""
        self._kept.clear()
        self._kept_bytes = 0

    def _loaded(self, image: Any, where: str) -> LoadedMedium:
        if isinstance(image, LoadedMedium):
            return image
        if not self._cache_bytes:
            return LoadedMedium(self._pixels(image, where))
        key, pixels = key_of(image), None
        if key is None:
            pixels = self._pixels(image, where)
            key = _digest(pixels.values.numpy().tobytes())
        tokens = self._kept.get(key)
        if tokens is not None:
            return LoadedMedium(tokens=tokens, key=key)
        return LoadedMedium(self._pixels(image, where) if pixels is None else pixels, key=key)

    @torch.no_grad()
    def _tokens_of(self, media: Sequence[LoadedMedium]) -> dict[Hashable, Views]:
        """Return the tokens of media by their keys, running the tower on those whose tokens are not known."""
        tokens = {medium.key: medium.tokens for medium in media if medium.tokens is not None}
        new = {
            medium.key: medium.pixels
            for medium in media
            if medium.key not in tokens and medium.pixels is not None
        }
        if new:
            frames = torch.cat([pixels.values for pixels in new.values()]).to(self._model.device)
            encoded = encode_distinct(self._model.vision_encoder, frames).cpu()
            parts = encoded.split([len(pixels) for pixels in new.values()])
            tokens |= {
                key: replace(pixels, values=own.clone())
                for (key, pixels), own in zip(new.items(), parts, strict=True)
            }
        for key, own in tokens.items():
            self._keep(key, own)
        return tokens

    def _keep(self, key: Hashable, tokens: Views) -> None:
        if key not in self._kept:
            self._kept[key] = tokens
            self._kept_bytes += tokens.values.nbytes
        self._kept.move_to_end(key)
        while self._kept_bytes > self._cache_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1].values.nbytes

    def _pixels(self, image: Any, where: str) -> Views:
        """Read an image or video as pixels."""
        if isinstance(image, LoadedMedium) and image.pixels is not None:
            return image.pixels
        if isinstance(image, FILES):
            medium: Any = image
            return load_pixels(self._processor, medium, where)
        try:
            return self._processor.image_processor.views(to_rgb(image))
        except UnreadableImage as error:
            raise UserError(f"{where}: not a readable image ({error}); replace it") from None


def key_of(medium: Any) -> Hashable | None:
    """Return what identifies an image or video without decoding it; None if only its pixels do.

    A file is identified by its path, size and time of change. What a URL leads to may change unnoticed.
    """
    match medium:
        case bytes():
            return _digest(medium)
        case Video(frames=frames, file=file):
            keys = tuple(map(key_of, frames if file is None else (file,)))
            return None if None in keys else ("video", *keys)
        case str() | os.PathLike() if not is_url(str(medium)):
            try:
                status = Path(medium).stat()
            except OSError:
                return None  # reading it raises the error that names the prompt
            return str(Path(medium).absolute()), status.st_mtime_ns, status.st_size
    return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
