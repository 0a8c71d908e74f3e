"""Small stand-ins for the Hub repositories of the released Flamingos: language models, tower, checkpoints.

The configurations are those of anas-awadalla/mpt-1b-redpajama-200b and anas-awadalla/mpt-7b (both with remote
code), togethercomputer/RedPajama-INCITE-Base-3B-v1 and huggyllama/llama-7b.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flamingo_ft.adapters.released_models import ReleasedModel
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.model import FlamingoForConditionalGeneration, build_flamingo
from tests.hub_server import Hub, Repository
from tests.regimes import shake

MOSAIC_GPT = {
    "alibi": True, "alibi_bias_max": 8, "architectures": ["MosaicGPT"], "attn_clip_qkv": None,
    "attn_impl": "torch", "attn_pdrop": 0, "attn_qk_ln": True, "attn_uses_sequence_id": False,
    "auto_map": {
        "AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig",
        "AutoModelForCausalLM": "mosaic_gpt.MosaicGPT",
    },
    "d_model": 2048, "emb_init_std": None, "emb_init_uniform_lim": None, "emb_pdrop": 0,
    "embedding_fraction": 1.0, "fan_mode": "fan_in", "init_device": "cpu", "init_div_is_residual": True,
    "init_gain": 0, "init_nonlinearity": "relu", "init_std": 0.02, "logit_scale": None,
    "low_precision_layernorm": True, "max_seq_len": 2048, "mlp_ratio": 4, "model_type": "mosaic_gpt",
    "n_heads": 16, "n_layers": 24, "no_bias": True, "param_init_fn": "kaiming_normal_", "prefix_lm": False,
    "resid_pdrop": 0, "softmax_scale": None, "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "float32", "transformers_version": "4.27.4", "use_cache": False, "verbose": 0,
    "vocab_size": 50432,
}  # fmt: skip
MPT = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
        "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None, "emb_init_uniform_lim": None, "fan_mode": "fan_in",
        "init_div_is_residual": True, "init_gain": 0, "init_nonlinearity": "relu", "init_std": 0.02,
        "name": "kaiming_normal_", "verbose": 0,
    },
    "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048,
    "model_type": "mpt", "n_heads": 32, "n_layers": 32, "no_bias": True,
    "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16", "transformers_version": "4.28.1", "use_cache": False, "verbose": 0,
    "vocab_size": 50432,
}  # fmt: skip
GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 32,
    "num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 1.0, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True,
    "use_parallel_residual": False, "vocab_size": 50432,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip


def put(hub: Hub, name: str, folder: Path) -> None:
    """Commit the files of a folder, and of folders in it, to a repository."""
    repository = hub.repositories.setdefault(name, Repository(private=False))
    files = {
        path.relative_to(folder).as_posix(): hub.store(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    lines = [{"key": "lfsFile", "value": {"path": path, "oid": digest}} for path, digest in files.items()]
    hub.commit(repository, "main", [{"key": "header", "value": {"summary": "put"}}, *lines])


def write_language_model(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shards: int = 2
) -> Path:
    """Write the configuration, the weights in shards (a tied head is left out) and a tokenizer."""
    folder.mkdir(parents=True)
    tied = config.get("tie_word_embeddings", True)
    kept = {
        name: tensor.clone() for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")
    }
    if shards == 1:
        torch.save(kept, folder / "pytorch_model.bin")
    else:
        _write_shards(folder, kept, shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    bytes_tokenizer().save_pretrained(folder)
    return folder


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    names = list(tensors)
    places = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        torch.save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-NeoX's tokenizer without merges: <|endoftext|>, no padding token, and the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# Sizes of the stand-ins by model type (width 48, 4 heads), and the key that sets the number of layers.
SMALL = {
    "mosaic_gpt": (
        MOSAIC_GPT, {"d_model": 48, "n_heads": 4, "max_seq_len": 512, "vocab_size": 320}, "n_layers",
    ),
    "mpt": (MPT, {"d_model": 48, "n_heads": 4, "max_seq_len": 512, "vocab_size": 320}, "n_layers"),
    **{
        config["model_type"]: (
            config,
            {
                "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4,
                "max_position_embeddings": 512, "vocab_size": 320,
            },
            "num_hidden_layers",
        )
        for config in (GPT_NEOX, LLAMA)
    },
}  # fmt: skip


def write_stand_in(folder: Path, model_type: str, layers: int = 4) -> Path:
    """A small language model with random weights in the form of a released one."""
    return write_language_model(folder, *small_language_model(model_type, layers))


def small_language_model(model_type: str, layers: int = 4) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the random weights of a small model in the form of a released one."""
    config, sizes, depth = SMALL[model_type]
    small = {**config, **sizes, depth: layers}
    torch.manual_seed(0)
    known = {key: value for key, value in small.items() if key not in ("auto_map", "torch_dtype")}
    return small, AutoModelForCausalLM.from_config(AutoConfig.for_model(**known)).state_dict()


TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def write_tower(folder: Path) -> Path:
    """The weights of an OpenCLIP model of the architecture `TOWER`, as the repository of a tag has them."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weights = open_clip.CLIP(**TOWER, quick_gelu=True).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def write_checkpoint(folder: Path, model: ReleasedModel, language: Path, tower: str, pretrained: str) -> Path:
    """Write a released model's checkpoint.pt for small backbones: bridge, embeddings without padding rows."""
    vision, lm = load_vision(tower, pretrained), load_language(str(language))
    flamingo, _ = build_flamingo(vision, lm, cross_attn_every_n_layers=model.interval)
    shake(flamingo.requires_grad_(True), 0.1)
    folder.mkdir(parents=True)
    torch.save(open_flamingo_names(flamingo, model, len(lm.tokenizer)), folder / "checkpoint.pt")
    return folder


def open_flamingo_names(
    flamingo: FlamingoForConditionalGeneration, model: ReleasedModel, vocabulary: int
) -> dict[str, Tensor]:
    """Return the bridge and the first ``vocabulary`` rows of the embeddings under OpenFlamingo's names.

    Version 1, whose text could attend to the next image, saved the cross-attention under a second name too.
    """
    embeddings = flamingo.lang_encoder.get_input_embeddings().weight
    names = (name for name, parameter in flamingo.named_parameters() if parameter is embeddings)
    tensors = {next(names): embeddings.detach()[:vocabulary].clone()}
    for name, tensor in flamingo.state_dict().items():
        if name.startswith("perceiver."):
            tensors[name] = tensor
        elif name.startswith("gated_cross_attn_layers."):
            _, k, rest = name.split(".", 2)
            tensors[f"lang_encoder.{model.layers_path}.{k}.gated_cross_attn_layer.{rest}"] = tensor
            if "following" in model.visibility:
                tensors[f"lang_encoder.{name}"] = tensor
    return tensors
