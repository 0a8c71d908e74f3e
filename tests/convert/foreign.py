"""Checkpoints as OpenFlamingo, Otter and Multimodal-GPT write them, around tiny models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.golden.deterministic_weights import EMBEDDINGS, fill, parameter_values
from tests.golden.recorded import trained_state_dict
from tests.golden.tiny_models import DECODER_LAYERS, EOC_TOKEN, IMAGE_SIZE, WIDTH, tiny_language_model

Tensors = dict[str, Tensor]
ANSWER, OTTERS = EOC_TOKEN + 2, EOC_TOKEN + 3  # Otter's own token, and its vocabulary
LAYERS = {family: f"lang_encoder.{path}" for family, path in DECODER_LAYERS.items()}


class ConfigDict(dict):
    """Settings in a class that need not be importable to read them."""


class Config:
    """Settings from a file, whose pickled state is not a dict, as in mmengine."""

    def __init__(self, **entries: object):
        self.entries = ConfigDict(tuning_config=ConfigDict(entries))

    def __getstate__(self) -> tuple:
        return (self.entries, "lora_config.py", "the file's text", {})

    def __setstate__(self, state: tuple) -> None:
        self.entries = state[0]


def open_flamingo(family: str) -> Tensors:
    return trained_state_dict(family)


def open_flamingo_1(family: str) -> Tensors:
    """Version 1 stores the cross-attention under a second name too."""
    tensors, inside = trained_state_dict(family), ".gated_cross_attn_layer."
    aliases = {}
    for name, tensor in tensors.items():
        if inside in name:
            layer, rest = name.split(inside)
            aliases[f"lang_encoder.gated_cross_attn_layers.{layer.rsplit('.', 1)[1]}.{rest}"] = tensor
    return tensors | aliases


def _otter_name(name: str) -> str:
    """Return Otter's name, without using the package's patterns."""
    for layer in range(6):
        name = name.replace(f"perceiver.layers.{layer}.0.", f"perceiver.layers.{layer}.")
        for entry in (0, 1, 3):
            name = name.replace(
                f"perceiver.layers.{layer}.1.{entry}.", f"perceiver.layers.{layer}.feed_forward.{entry}."
            )
    for entry in (0, 1, 3):
        name = name.replace(
            f"gated_cross_attn_layer.ff.{entry}.", f"gated_cross_attn_layer.feed_forward.{entry}."
        )
    return name


def _widened(name: str, tensor: Tensor) -> Tensor:
    """Return a vocabulary matrix with a row for Otter's own token."""
    row = parameter_values(f"answer.{EMBEDDINGS[0]}", (1, tensor.shape[1]))
    return torch.cat([tensor[:ANSWER], row])


def otter_trained(family: str) -> Tensors:
    """final_weights.pt: the trainable parameters, which are the bridge and the vocabulary matrices."""
    tensors = {name: t for name, t in trained_state_dict(family).items() if "embed_positions" not in name}
    wide = {
        name: _widened(name, t)
        for name, t in tensors.items()
        if name.endswith((*EMBEDDINGS, "lm_head.weight"))
    }
    return {_otter_name(name): tensor for name, tensor in (tensors | wide).items()}


def otter_tower() -> CLIPVisionModel:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE, patch_size=4, hidden_act="gelu", projection_dim=16, **sizes
    )
    model = CLIPVisionModel(config).eval()
    fill(model, "otter.")
    return model


def otter_whole(family: str) -> Tensors:
    """A whole Otter, with its own weights of the tower and the language model."""
    lm = tiny_language_model(family)
    fill(lm, "otter.lang_encoder.")
    lm.resize_token_embeddings(OTTERS)
    lm.tie_weights()
    layers, language = LAYERS[family] + ".", {}
    for name, tensor in lm.state_dict().items():
        k, _, rest = f"lang_encoder.{name}".removeprefix(layers).partition(".")
        name = f"{layers}{k}.decoder_layer.{rest}" if k.isdigit() else f"lang_encoder.{name}"
        language[name] = tensor.clone()
    bridge = {
        n: t for n, t in otter_trained(family).items() if n.startswith("perceiver.") or "gated_cross" in n
    }
    tower = {
        f"vision_encoder.vision_model.{n.removeprefix('vision_model.')}": t
        for n, t in otter_tower().state_dict().items()
    }
    return language | bridge | tower


# Matrices of the language model with LoRA. Multimodal-GPT has it in the cross-attention blocks too, and of
# rank 16 in its released settings.
LORA_TARGETS = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj"),
    "opt": ("self_attn.q_proj",),
    "gpt_neox": ("attention.dense",),
    "mpt": ("attn.out_proj",),
}
RANK = 2


def multimodal_gpt(family: str, adapter: str = "default.") -> Tensors:
    """LoRA of the language model and of the cross-attention, as PEFT named it inside the model it wrapped."""
    lm, layers = tiny_language_model(family), LAYERS[family].removeprefix("lang_encoder.")
    bridge = trained_state_dict(family)
    lora: Tensors = {}
    for k in range(4):
        for matrix in LORA_TARGETS[family]:
            weight = lm.get_submodule(f"{layers}.{k}.{matrix}").weight
            lora |= _lora_pair(f"{layers}.{k}.decoder_layer.{matrix}", weight, adapter)
        for matrix in ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3"):
            name = f"lang_encoder.{layers}.{k}.gated_cross_attn_layer.{matrix}.weight"
            if name in bridge:
                lora |= _lora_pair(f"{layers}.{k}.gated_cross_attn_layer.{matrix}", bridge[name], adapter)
    return lora


def _lora_pair(name: str, weight: Tensor, adapter: str) -> Tensors:
    rows, columns = weight.shape
    name = f"lang_encoder.base_model.model.{name}"
    shapes = {
        f"{name}.lora_A.{adapter}weight": (RANK, columns),
        f"{name}.lora_B.{adapter}weight": (rows, RANK),
    }
    return {key: parameter_values(key, shape) for key, shape in shapes.items()}


def save(path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, path)
    return path


def save_multimodal_gpt(path: Path, tensors: Tensors, alpha: int = 16) -> Path:
    """Save as its training loop does: from DDP, with settings in a class of their own beside the weights."""
    settings = Config(lora=True, lora_r=RANK, lora_alpha=alpha, arguments=argparse.Namespace(epochs=3))
    weights = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 3, "model_state_dict": weights, "tuning_config": settings}, path)
    return path


def save_otter(folder: Path, tensors: Tensors, shards: int = 2, **config: object) -> Path:
    """Save a folder with several shards, as transformers does."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "otter", "cross_attn_every_n_layers": 2, **config})
    )
    names = sorted(tensors)
    parts = {f"pytorch_model-{i + 1:05}-of-{shards:05}.bin": names[i::shards] for i in range(shards)}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def in_dtype(make: Callable[[str], Tensors], dtype: torch.dtype) -> Callable[[str], Tensors]:
    return lambda family: {name: tensor.to(dtype) for name, tensor in make(family).items()}
