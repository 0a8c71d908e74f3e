"""Text tags of tiles: special tokens after ``<image>``, each of which attends to one view of the image.

This is how NVLM-X (arXiv:2409.11402) gives the places of tiles to the language model: the cross-attention
of a tag is masked to the tokens of its tile. All tags follow every ``<image>``, so that the text does not
depend on the image's grid; those beyond its tiles see nothing. Tags are inserted into token ids: texts, and
the offsets of their other tokens, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .tiles import UNTILED, Grid

WHOLE_TAG = "<tile_whole>"


def tile_tags(max_tiles: int) -> list[str]:
    """Return the tag of views of the whole image, then those of the tiles, row by row."""
    return [WHOLE_TAG, *(f"<tile_{number}>" for number in range(1, max_tiles + 1))]


def tile_tag_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the tags that a tokenizer has, in the order of `tile_tags`; () without tags."""
    return _tag_ids(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _tag_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[int, ...]:
    """size: vocabulary size, part of the cache key so that added tokens are seen."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(_ids_in_order(added)) if WHOLE_TAG in added else ()


def _ids_in_order(added: dict[str, int]) -> Iterator[int]:
    for tag in tile_tags(len(added)):
        if tag not in added:
            return
        yield added[tag]


def tags_of_latents(views: int, grid: Grid, latents: int) -> Tensor:
    """Return which tag (L,) sees each latent of a medium, as an index into `tile_tags`.

    The ``latents`` are those of its ``views``, in their order and as many of each. Images in one view and
    videos belong to the tag of the whole.
    """
    if grid == UNTILED:
        return torch.zeros(latents, dtype=torch.long)
    has_whole_view = views > grid[0] * grid[1]
    tags = torch.arange(views) + (0 if has_whole_view else 1)
    return tags.repeat_interleave(latents // views)


def tag_of_tokens(input_ids: Tensor, tag_ids: Sequence[int]) -> Tensor:
    """Return which tag each token (R, T) is, as an index into ``tag_ids``; -1 for other tokens."""
    is_tag = input_ids[..., None] == input_ids.new_tensor(tag_ids)
    return torch.where(is_tag.any(-1), is_tag.long().argmax(-1), -1)
