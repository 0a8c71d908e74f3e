"""The perceiver resampler: any number of visual tokens in, a fixed number of latents out.

Flamingo (arXiv:2204.14198), section 3.1.1 and appendix A.1.1. Parameter names are OpenFlamingo's, so that its
checkpoints load key by key. Shapes: B batch, M media, F frames, V visual tokens, L latents, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flamingo_ft.errors import UserError

from .layers import (
    CheckpointedBlock,
    attend,
    attention_weights,
    feed_forward,
    merge_heads,
    split_heads,
)
from .tiles import UNTILED, Grid


class PerceiverAttention(nn.Module):
    """Attention of the latents to the visual tokens and to themselves."""

    def __init__(self, width: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """tokens (N, K, D), latents (N, L, D) -> (N, L, D)."""
        return self.to_out(merge_heads(attend(*self._project(tokens, latents))))

    def weights(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Return the attention weights of `forward` in float32: (N, H, L, K + L), the latents' own last."""
        query, key, _ = self._project(tokens, latents)
        return attention_weights(query, key)

    def _project(self, tokens: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (N, H, L, d), and keys and values (N, H, K + L, d), those of latents last."""
        latents = self.norm_latents(latents)
        seen = torch.cat([self.norm_media(tokens), latents], dim=1)
        key, value = self.to_kv(seen).chunk(2, dim=-1)
        query = split_heads(self.to_q(latents), self.heads)
        return query, split_heads(key, self.heads), split_heads(value, self.heads)


class PerceiverLayer(CheckpointedBlock, nn.ModuleList):
    """Attention, then feed-forward, each with a residual connection.

    A list, so that its keys are OpenFlamingo's, ``layers.{i}.{0,1}``.
    """

    def __init__(self, width: int, heads: int, dim_head: int, ff_mult: int):
        nn.ModuleList.__init__(
            self, [PerceiverAttention(width, heads, dim_head), feed_forward(width, ff_mult)]
        )

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """latents (N, L, D), tokens (N, K, D) -> latents (N, L, D)."""
        attention, mlp = self
        latents = latents + attention(tokens, latents)
        return latents + mlp(latents)


TILE_STD = 0.5  # of the embeddings of tiles at first, relative to the tokens


class PerceiverResampler(nn.Module):
    """Resamples each medium (one image, or the frames of one video) into ``num_latents`` latents.

    depth: number of layers. With 0 nothing is resampled: the latents are the visual tokens themselves, each
    the mean of the frames, after a LayerNorm; ``num_latents`` and the options of layers are not used. The
    tokens of an image's tiles are not averaged: each is a latent.

    max_num_frames: adds a learned embedding for each frame; max_num_media: adds one for each position of a
    medium in its sample; max_tiles: adds those of a tile's row and column, and one to views of the whole
    image. Without them, frames, media or tiles are unordered, as in the released OpenFlamingo models. The
    unit of those of tiles is the root mean square of the medium's tokens, whatever the tower's scale.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        max_tiles: int | None = None,
        ff_mult: int = 4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, dim)) if depth else None
        self.frame_embs = nn.Parameter(torch.empty(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.empty(max_num_media, 1, dim)) if max_num_media else None
        # The whole image, then the rows, then the columns.
        self.tile_embs = nn.Parameter(torch.empty(1 + 2 * max_tiles, dim)) if max_tiles else None
        self.reset_parameters()
        self.layers = nn.ModuleList(PerceiverLayer(dim, heads, dim_head, ff_mult) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def reset_parameters(self) -> None:
        """Initialize the parameters that are the resampler's own, not its layers'."""
        for parameter in (self.latents, self.frame_embs, self.media_time_embs):
            if parameter is not None:
                nn.init.normal_(parameter)
        if self.tile_embs is not None:
            # From zero, places are learned much later (tests/benchmarks/README.md, "Detail in images").
            nn.init.normal_(self.tile_embs, std=TILE_STD)

    def forward(self, tokens: Tensor, slots: Tensor | None = None, grid: Grid = UNTILED) -> Tensor:
        """tokens (B, M, F, V, D) -> latents (B, M, L, D); without layers, L = V, or F * V for tiles.

        slots (B, M): 0-based position of each medium in its sample; by default its index along M. grid: rows
        and columns of tiles that the media are divided into; the first of F views may show the whole image.
        Raises UserError for more frames, media or tiles than there are learned embeddings.
        """
        tokens = self._add_positions(tokens.to(self.norm.weight.dtype), slots)
        tokens = self._add_tile_positions(tokens, grid)
        if self.latents is None:
            return self.norm(tokens.mean(2) if grid == UNTILED else tokens.flatten(2, 3))
        batch, media = tokens.shape[:2]
        tokens = tokens.flatten(2, 3).flatten(0, 1)
        latents = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            # pyrefly: ignore[not-callable]
            latents = layer(layer.entry(latents), tokens)
        return self.norm(latents).unflatten(0, (batch, media))

    def _add_positions(self, tokens: Tensor, slots: Tensor | None) -> Tensor:
        """Add the frame and media embeddings to tokens (B, M, F, V, D)."""
        media, frames = tokens.shape[1:3]
        if self.frame_embs is not None:
            _check_fits(frames, self.frame_embs, "frames per medium", "max_num_frames")
            tokens = tokens + self.frame_embs[:frames, None]
        if self.media_time_embs is not None:
            slots = torch.arange(media, device=tokens.device) if slots is None else slots
            _check_fits(int(slots.max()) + 1, self.media_time_embs, "media per sample", "max_num_media")
            tokens = tokens + self.media_time_embs[slots][..., None, :, :]
        return tokens

    def _add_tile_positions(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add the embeddings of the views' places to tokens (B, M, F, V, D)."""
        if self.tile_embs is None:
            return tokens
        most = len(self.tile_embs) // 2
        _check_fits(max(grid), self.tile_embs[:most], "rows or columns of tiles", "max_tiles")
        whole, rows, columns = self.tile_embs.split([1, most, most])
        places = (rows[: grid[0], None] + columns[None, : grid[1]]).flatten(0, 1)
        views = tokens.shape[2]
        if grid == UNTILED:
            places = whole.expand(views, -1)
        elif views > len(places):
            places = torch.cat([whole, places])
        scale = tokens.detach().square().mean((2, 3, 4), keepdim=True).sqrt()
        return tokens + scale * places[:, None]


def _check_fits(count: int, embeddings: Tensor, what: str, option: str) -> None:
    if count > len(embeddings):
        raise UserError(
            f"perceiver: {option} is {len(embeddings)}, got {count} {what}; pass fewer, or train with more"
        )
