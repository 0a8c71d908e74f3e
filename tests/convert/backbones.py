"""The tiny models of the golden numbers in folders: language model, its tokenizer, tower."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flamingo_ft.convert import Backbones
from tests.golden.tiny_models import EOC_TOKEN, IMAGE_SIZE, WIDTH, tiny_clip, tiny_language_model

FAMILIES = ("opt", "llama", "gpt_neox", "mpt")
VISION = {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 4, "image_size": IMAGE_SIZE}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with one word for each id below the two that a Flamingo adds; padding is 0."""
    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, EOC_TOKEN)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def write_language(folder: Path, family: str) -> Path:
    tiny_language_model(family).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def write_tower(folder: Path) -> Path:
    """Write a tower in OpenCLIP's local-dir format."""
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    tensors = {name: tensor.contiguous() for name, tensor in tiny_clip().state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


@cache
def written(root: Path, family: str) -> Backbones:
    """Write both backbones of a family to ``root``, once."""
    tower = root / "tower"
    vision = tower if tower.is_dir() else write_tower(tower)
    return Backbones(str(write_language(root / family, family)), str(vision))
