"""Where in the images each token of an answer looks: `Look`, which `Predictor.look` returns.

Shapes: K gated cross-attention blocks, T tokens of the answer, M media, L latents of each, F frames,
H and W pixels of the tower's input, h and w its grid of visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flamingo_ft.backbones.tower import to_picture
from flamingo_ft.backbones.visual_tokens import map_to_tokens, spatial_maps
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.attention_maps import attention_maps, latent_maps, record_attention
from flamingo_ft.model.tiles import UNTILED, Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode the first bytes of a character to


@dataclass(frozen=True, eq=False)
class Look:
    """An answer, and for each of its tokens the attention over the images with which it was chosen.

    A token is chosen at the position before it, so its weights are those of that position. They are attention
    weights averaged over the heads, through the perceiver back to the visual tokens
    (`model.attention_maps`). Those of a token and a layer sum to 1 over all media that it may attend to; the
    others are zero: in the mode ``immediate``, all but the last image. They say what was read, not what
    decided the answer. The tower also mixes patches with each other, so that a patch of the background may be
    read for what it holds of the rest.

    answer: the text that `Predictor.__call__` returns. tokens: the T pieces of the answer, without its end
    token. layers: the K decoder layers that follow the blocks. weights (K, T, M, F, h, w), float32; F is 1
    for images, and frames that a shorter video lacks are zero. pictures: of each medium the frames
    (F, H, W, 3) as the tower sees them, resized and cropped, in 8-bit RGB. grids: rows and columns of the
    tiles of each medium; the F frames of a tiled image are the whole of it, unless left out, and its tiles
    row by row. latents (M, L, F, h, w), float32: how much of each visual token each latent of the perceiver
    holds, with a sum of 1 per latent; without a perceiver, each latent is a visual token.
    """

    answer: str
    tokens: list[str]
    layers: list[int]
    weights: np.ndarray
    pictures: list[np.ndarray]
    grids: list[Grid]
    latents: np.ndarray

    @property
    def average(self) -> np.ndarray:
        """The mean of the weights over the layers, all alike however open their gates: (T, M, F, h, w)."""
        return self.weights.mean(0)

    @property
    def media_weights(self) -> np.ndarray:
        """How much of each token's attention each medium gets, as a mean over the layers: (T, M)."""
        return self.average.sum((2, 3, 4))

    def figure(self, layer: int | None = None) -> Figure:
        """Draw the weights over the pictures, one panel per token, on one colour scale. It begins at the
        weight that each visual token would have if attention were spread evenly.

        layer: one of ``layers``; by default the average over all. The grid is stretched over the picture as
        the tower sees it; a tower that ignores a border narrower than a patch is off by less than that.
        Raises UserError for another layer.
        """
        from .look_figure import draw_look  # importing matplotlib takes longer than answering

        return draw_look(self.pictures, self.grids, self.tokens, self._weights_of(layer))

    def token_figure(self, token: int | None = None, layer: int | None = None) -> Figure:
        """Draw the weights of one token over the pictures. It has a colour scale of its own.

        token: its index in ``tokens``; by default the mean over all of them. layer: see `figure`.
        """
        from .look_figure import draw_look

        weights = self._weights_of(layer)
        if token is None:
            mean = weights.mean(0, keepdims=True)
            return draw_look(self.pictures, self.grids, ["mean of all tokens"], mean)
        return draw_look(self.pictures, self.grids, [self.tokens[token]], weights[token : token + 1])

    def latent_figure(self, medium: int = 0, count: int = 16) -> Figure:
        """Draw what the first ``count`` latents of the perceiver hold of a medium, one panel per latent.

        medium: its index.
        """
        from .look_figure import draw_look

        held = self.latents[medium, :count, None]
        names = [f"latent {number}" for number in range(1, len(held) + 1)]
        return draw_look(self.pictures[medium : medium + 1], self.grids[medium : medium + 1], names, held)

    def _weights_of(self, layer: int | None) -> np.ndarray:
        """Return the weights before a decoder layer, or their mean over the layers: (T, M, F, h, w)."""
        if layer is None:
            return self.average
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise UserError(f"layer: no cross-attention before decoder layer {layer}; use one of {known}")
        return self.weights[self.layers.index(layer)]


@torch.no_grad()
def look_at(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    inputs: Mapping[str, Tensor],
    answer_ids: list[int],
    answer: str,
) -> Look:
    """Read a prompt and its answer once more, all at once, and return where the answer looks.

    inputs: input_ids (1, T), pixel_values (1, M, C, H, W) or (1, M, F, C, H, W), and frame_counts (1, M) and
    tile_grids (1, M, 2) if the numbers of frames differ or images are tiled. Raises UserError for a prompt
    without images.
    """
    if "pixel_values" not in inputs:
        raise UserError("look: got a prompt without images; pass at least one")
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    pixels = inputs["pixel_values"][0]
    pixels = pixels[:, None] if pixels.dim() == 4 else pixels  # (M, F, C, H, W)
    maps = spatial_maps(model.vision_encoder, pixels.flatten(0, 1))
    prompt, counts, grids = inputs["input_ids"], inputs.get("frame_counts"), inputs.get("tile_grids")
    text = torch.cat([prompt, prompt.new_tensor(answer_ids[:-1])[None]], dim=1)
    tokens = map_to_tokens(maps).unflatten(0, pixels.shape[:2])[None]
    with record_attention(model) as record:
        model(text, vision_tokens=tokens, frame_counts=counts, tile_grids=grids, use_cache=False)
    start = prompt.shape[1] - 1
    weights = attention_maps(record)[:, start : start + len(answer_ids)].unflatten(-1, maps.shape[2:])
    lengths = [pixels.shape[1]] * len(pixels) if counts is None else counts[0].tolist()
    pictures = to_picture(processor.image_processor.open_clip_preprocess, pixels).numpy()
    return Look(
        answer=answer,
        tokens=token_texts(processor.tokenizer, answer_ids),
        layers=list(record.blocks),
        weights=weights.numpy(),
        pictures=[frames[:length] for frames, length in zip(pictures, lengths, strict=True)],
        grids=[UNTILED] * len(pixels) if grids is None else [(r, c) for r, c in grids[0].tolist()],
        latents=latent_maps(record).unflatten(-1, maps.shape[2:]).numpy(),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; of a character in several tokens, all with its last one."""
    texts, length = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end]))
        if text.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
        else:
            texts.append(text[length:])
            length = len(text)
    return texts
