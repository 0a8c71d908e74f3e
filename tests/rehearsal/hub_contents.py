"""What a local Hub serves for the released OpenFlamingo models: small look-alikes under the real names.

File names, formats and the kinds of tensors are those of the real repositories: a single pytorch_model.bin
with the buffers that earlier versions of transformers saved, three shards in float32 beside code of the
model's own, a tower in OpenCLIP's two formats, checkpoints with leftover buffers. Weights are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from flamingo_ft.adapters.released_models import TOWER, ReleasedModel, find_released
from tests import hub_folders
from tests.hub_folders import put
from tests.hub_server import Hub

from .datasets_on_the_hub import LLAVA, VQA_RAD, write_card, write_llava, write_vqa_rad

INCITE, MPT = "togethercomputer/RedPajama-INCITE-Base-3B-v1", "anas-awadalla/mpt-7b"
CLIP_VIT_L = "timm/vit_large_patch14_clip_224.openai"
OPEN_FLAMINGO_4B = "openflamingo/OpenFlamingo-4B-vitl-rpj3b"
OPEN_FLAMINGO_9B = "openflamingo/OpenFlamingo-9B-vitl-mpt7b"
SPECIAL = ("<|endoftext|>", "<|padding|>")
MPT_CODE = (
    "adapt_tokenizer", "attention", "blocks", "configuration_mpt", "flash_attn_triton",
    "hf_prefixlm_converter", "meta_init_context", "modeling_mpt", "norm", "param_init_fns",
)  # fmt: skip


def fill(hub: Hub, folder: Path) -> None:
    """Serve the repositories that `recipes/open_flamingo_4b.yaml` and `_9b.yaml` need, and two datasets.

    folder: scratch space for the files. OpenCLIP has to take ViT-L-14 for something small
    (`hub_folders.TOWER`) when this is called and when the models are loaded.
    """
    put(hub, CLIP_VIT_L, _write_tower(folder / "tower"))
    put(hub, INCITE, _write_incite(folder / "incite"))
    put(hub, MPT, _write_mpt(folder / "mpt"))
    put(hub, OPEN_FLAMINGO_4B, _write_4b(folder / "4b", folder / "incite"))
    put(hub, OPEN_FLAMINGO_9B, _write_checkpoint(folder / "9b", OPEN_FLAMINGO_9B, folder / "mpt"))
    put(hub, f"datasets/{VQA_RAD}", write_vqa_rad(folder / "vqa_rad"))
    put(hub, f"datasets/{LLAVA}", write_llava(folder / "llava"))


# --- Backbones


def _write_tower(folder: Path) -> Path:
    """The same weights in both of OpenCLIP's formats, and in timm's older one, as the repository has them."""
    hub_folders.write_tower(folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    for file in ("open_clip_pytorch_model.bin", "pytorch_model.bin"):
        torch.save(weights, folder / file)
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    config = {"model_cfg": {**hub_folders.TOWER, "quick_gelu": True}, "preprocess_cfg": statistics}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_large_patch14_clip_224"}))
    write_card(folder, "apache-2.0")
    return folder


def _write_incite(folder: Path) -> Path:
    """One file in float16, with the masks and frequencies that transformers 4.28 saved."""
    config, weights = hub_folders.small_language_model("gpt_neox")
    earlier = {"lm_head.weight": "embed_out.weight"}
    tensors = {earlier.get(name, name): tensor.half() for name, tensor in weights.items()}
    tensors["embed_out.weight"] = _printable(tensors["embed_out.weight"])
    tensors |= _neox_buffers("gpt_neox.layers.{}.attention", config, torch.float16)
    hub_folders.write_language_model(folder, config, tensors, shards=1)
    _write_neox_tokenizer(folder)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0}
    _write_json(folder / "generation_config.json", generation | {"transformers_version": "4.28.1"})
    write_card(folder, "apache-2.0")
    return folder


def _neox_buffers(path: str, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    length = config["max_position_embeddings"]
    width = config["hidden_size"] // config["num_attention_heads"]
    buffers = {
        "bias": torch.ones(length, length, dtype=torch.bool).tril()[None, None],
        "masked_bias": torch.tensor(-1e4, dtype=dtype),
        "rotary_emb.inv_freq": (10000 ** -(torch.arange(0, width, 2) / width)).to(dtype),
    }
    return {
        f"{path.format(layer)}.{name}": tensor.clone()
        for layer in range(config["num_hidden_layers"])
        for name, tensor in buffers.items()
    }


def _write_mpt(folder: Path) -> Path:
    """Three shards in float32 beside the model's own code, which nothing may run."""
    config, weights = hub_folders.small_language_model("mpt")
    config |= {"_name_or_path": "mosaicml/mpt-7b", "torch_dtype": "float32"}
    weights["transformer.wte.weight"] = _printable(weights["transformer.wte.weight"])
    hub_folders.write_language_model(folder, config, weights, shards=3)
    for module in MPT_CODE:
        (folder / f"{module}.py").write_text('raise RuntimeError("code of the repository was run")\n')
    _write_neox_tokenizer(folder)
    generation = {"_from_model_config": True, "eos_token_id": 0}
    _write_json(
        folder / "generation_config.json",
        generation | {"transformers_version": "4.28.1", "use_cache": False},
    )
    return folder


def _printable(matrix: Tensor) -> Tensor:
    """Shrink the rows of tokens that are no ASCII characters, so that greedy answers can be read."""
    characters = [index for index, token in enumerate(_tokens()) if len(token) == 1 and "!" <= token <= "~"]
    shrunk = matrix / 10
    shrunk[characters] = matrix[characters]
    return shrunk


def _write_neox_tokenizer(folder: Path) -> None:
    """GPT-NeoX's tokenizer without merges: special tokens first, runs of spaces as added tokens last."""
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(_tokens())}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(" " * length, normalized=True) for length in range(24, 1, -1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), SPECIAL[0])
    _write_json(folder / "special_tokens_map.json", names)
    settings = {"add_prefix_space": False, "clean_up_tokenization_spaces": True, "model_max_length": 2048}
    _write_json(
        folder / "tokenizer_config.json", {**names, **settings, "tokenizer_class": "GPTNeoXTokenizer"}
    )


def _tokens() -> list[str]:
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]


# --- Checkpoints


def _write_4b(folder: Path, language: Path) -> Path:
    """The checkpoint of the 4B model also has the output head and the buffers of the wrapped layers."""
    _write_checkpoint(folder, OPEN_FLAMINGO_4B, language)
    config = json.loads((language / "config.json").read_text())
    tensors = torch.load(folder / "checkpoint.pt")
    embedding = tensors["lang_encoder.gpt_neox.embed_in.weight"]
    tensors["lang_encoder.embed_out.weight"] = _with_known_rows(
        torch.randn_like(embedding), language, "embed_out.weight"
    )
    path = "lang_encoder.gpt_neox.layers.{}.decoder_layer.attention"
    torch.save(tensors | _neox_buffers(path, config, torch.float32), folder / "checkpoint.pt")
    return folder


def _write_checkpoint(folder: Path, name: str, language: Path) -> Path:
    """A bridge of random weights, and the embeddings, of which only rows of the new tokens were trained."""
    hub_folders.write_checkpoint(folder, _released(name), language, *TOWER)
    tensors = torch.load(folder / "checkpoint.pt")
    (embedding,) = (key for key in tensors if key.endswith(("embed_in.weight", "wte.weight")))
    stored = embedding.removeprefix("lang_encoder.")
    tensors[embedding] = _with_known_rows(tensors[embedding], language, stored)
    torch.save(tensors, folder / "checkpoint.pt")
    write_card(folder, None)
    return folder


def _with_known_rows(matrix: Tensor, language: Path, name: str) -> Tensor:
    """Return a vocabulary matrix in float32 with the language model's rows for all but the new tokens."""
    shards = (torch.load(file) for file in sorted(language.glob("pytorch_model*.bin")))
    known = next(shard[name] for shard in shards if name in shard)
    rows = len(Tokenizer.from_file(str(language / "tokenizer.json")).get_vocab())
    return torch.cat([known[:rows].float(), matrix[rows:].float()])


def _released(name: str) -> ReleasedModel:
    model = find_released(name)
    assert model is not None, name
    return model


# --- Small files


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(value.items())), indent=2) + "\n")
