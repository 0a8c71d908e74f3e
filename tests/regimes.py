"""The regimes of training, unquantized and quantized, as overrides of one small recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from flamingo_ft.adapters import save_adapter
from flamingo_ft.config import Recipe, load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.training.build import build_model, make_trainer

# In float32, so that processes of their own compute as this one does.
RECIPE = """\
# a small run
model:
  vision: {name: nano, compute_dtype: fp32}
  language: {name: nano, compute_dtype: fp32}
  perceiver: {num_latents: 3, depth: 1, heads: 2, dim_head: 8}
  cross_attention: {heads: 2, dim_head: 8}
data: {train: [{path: train.jsonl}]}
train: {output_dir: run, max_steps: 1, batch_size: 2, learning_rate: 1.0e-2, precision: fp32,
  logging_steps: 1, num_workers: 0}
"""
NOTHING_WHOLE = "trainable={perceiver: false, cross_attention: false, new_tokens: false}"
AUTO = ("train.precision=auto", "model.vision.compute_dtype=auto", "model.language.compute_dtype=auto")
LORA = "lora.language={r: 4, lora_alpha: 8}"
LORA_ON_BRIDGE = (
    "lora.cross_attention={r: 2}",
    "lora.perceiver={r: 3}",
    "lora.vision={r: 2, target_modules: [in_proj]}",
)
REGIMES = {
    "bridge": (),
    "bridge and LoRA": (LORA,),
    "LoRA only": (NOTHING_WHOLE, LORA, "model.init_from=start"),
    "LoRA everywhere": (NOTHING_WHOLE, LORA, *LORA_ON_BRIDGE, "model.init_from=start"),
}


def quantized(form: str, regime: str = "") -> tuple[str, ...]:
    """Return overrides that quantize both backbones, and a frozen bridge."""
    backbones = (f"model.vision.quantization={form}", f"model.language.quantization={form}")
    return (*backbones, f"model.bridge_quantization={form}") if regime.startswith("LoRA") else backbones


def write_run(folder: Path) -> None:
    """The recipe and its data."""
    for shade in range(2):
        Image.new("RGB", (32, 32), (30 + 200 * shade,) * 3).save(folder / f"{shade}.png")
    blocks = [{"type": "image"}, {"type": "text", "text": "Which shade?"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": blocks},
                {"role": "assistant", "content": ("Dark.", "Light.")[i]},
            ],
            "images": [f"{i}.png"],
        }
        for i in range(2)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(RECIPE)


def recipe(*overrides: str) -> Recipe:
    """Load the recipe in the current directory."""
    return load_recipe("./recipe.yaml", overrides)


def build(*overrides: str):
    """Return model and processor of the recipe, ready to train."""
    return build_model(recipe(*overrides))


def trainer(model, processor, *overrides: str):
    """Return a trainer on the recipe's data."""
    config = recipe(*overrides)
    return make_trainer(model, processor, open_data(config.data, config.train.seed), config, [])


@torch.no_grad()
def shake(model, scale: float = 0.1, seed: int = 0) -> None:
    """Add noise to every trainable parameter, so that gates are open and LoRA weights matter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn_like(parameter))


def write_start(folder: Path, *overrides: str) -> None:
    """Write an adapter to start from, with open gates."""
    model, processor = build(*overrides)
    shake(model, 0.3)
    save_adapter(model, processor, folder)


def inputs(processor) -> dict[str, torch.Tensor]:
    """Return model inputs of a text with two images."""
    text = f"{processor.image_token} Which digit? {processor.image_token} And this? <|endofchunk|>"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    }


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    return model.eval()(**inputs(processor)).logits
