"""Store an adapter and its logits, written by the package on PYTHONPATH: see README.md.

PYTHONPATH=CHECKOUT python make.py KIND FOLDER
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from flamingo_ft.adapters.save import save_adapter
from flamingo_ft.adapters.trainable import set_trainable
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import TrainableSection
from flamingo_ft.model import build_flamingo

EXPECTED = "expected.safetensors"
SMALL = {"heads": 1, "dim_head": 8, "ff_mult": 1}
TARGETS = {
    "bridge": {},
    "bridge_and_lora": {"language": ["q_proj", "v_proj"]},
    "lora_on_a_bridge": {
        "language": ["q_proj"],
        "cross_attention": ["to_q"],
        "perceiver": ["to_kv"],
        "vision": ["in_proj"],
    },
}
START = "1_bridge"  # beside the folder that is written


def main(kind: str, folder: Path) -> None:
    model, processor = build_flamingo(
        load_vision("nano"),
        load_language("nano"),
        cross_attn_every_n_layers=4,
        perceiver={"num_latents": 2, "depth": 1, **SMALL},
        cross_attention=SMALL,
    )
    starts = kind == "lora_on_a_bridge"
    if starts:
        from flamingo_ft.adapters import init_bridge

        init_bridge(model, folder.parent / START)
        model.config.bridge_init["path"] = START
    whole = dict.fromkeys(("perceiver", "cross_attention", "new_tokens"), not starts)
    lora = add_small_lora(model, TARGETS[kind]) if TARGETS[kind] else ()
    set_trainable(model, TrainableSection(**whole, dtype="auto" if kind == "bridge" else "bf16"), *lora)
    perturb(model)
    save_adapter(model, processor, folder)
    save_file({"logits": prompt_logits(model.eval(), processor)}, folder / EXPECTED)


def add_small_lora(model, targets):
    from flamingo_ft.adapters.lora import add_lora
    from flamingo_ft.config import LoraSection

    lora = LoraSection(
        **{part: {"r": 2, "lora_alpha": 4, "target_modules": names} for part, names in targets.items()}
    )
    add_lora(model, lora)
    return (lora,)


@torch.no_grad()
def perturb(model) -> None:
    """Change every trainable parameter, in place of training."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def prompt_logits(model, processor) -> torch.Tensor:
    """Return logits (vocabulary,) after a prompt with two synthetic images."""
    text = f"{processor.image_token} Which digit? {processor.image_token} And this? <|endofchunk|>"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    pixels = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(1, 2, 3, 32, 32)
    return model(input_ids=ids, pixel_values=pixels).logits[0, -1].float()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
