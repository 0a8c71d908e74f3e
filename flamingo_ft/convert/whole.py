"""A foreign checkpoint as a whole model of this package."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from flamingo_ft.adapters import write_card
from flamingo_ft.adapters.answering import use_greedy_decoding
from flamingo_ft.adapters.merge import LARGEST_SHARD, fold_lora, make_standalone
from flamingo_ft.adapters.save import save_processor
from flamingo_ft.backbones.attention import close_attention
from flamingo_ft.backbones.identity import tensors_sha256
from flamingo_ft.formats import Checkpoint
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor


def save_whole(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    folder: Path,
    checkpoint: Checkpoint,
    own_backbones: bool,
) -> None:
    """Write a model that the checkpoint was put into, updates folded in, in the number formats that it has.

    own_backbones: whether weights of its backbones are not those of their names.
    """
    parts = fold_lora(model)
    close_attention(model.vision_encoder)
    formats = {parameter.dtype for parameter in model.parameters()}
    origin = {
        "checkpoint_sha256": tensors_sha256(checkpoint.tensors()),
        "lora": parts,
        "own_backbones": own_backbones,
    }
    use_greedy_decoding(model, processor)
    make_standalone(model.config, reduce(torch.promote_types, formats), origin)
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    save_processor(processor, folder)
    write_card(folder)


@torch.no_grad()
def replace_tensors(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in place of the model's, of a vocabulary's matrix the rows that there are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        own = parameters[name]
        if own.shape == tensor.shape:  # as it is mapped from the disk, without a copy
            own.data = tensor
            continue
        whole = own.data.to(tensor.dtype, copy=True)
        whole[: len(tensor)] = tensor
        own.data = whole
