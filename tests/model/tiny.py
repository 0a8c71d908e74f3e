"""A small Flamingo with random weights, its gates open, for tests that need no training."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration

VOCABULARY, MEDIA, EOC = 60, 58, 59
IMAGE_SIZE, VISION_WIDTH = 16, 32
VISION_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "layers": 2,
        "width": VISION_WIDTH,
        "head_width": 16,
        "patch_size": 8,
    },
    "quick_gelu": False,
}
PERCEIVER = {"num_latents": 3, "depth": 2, "heads": 2, "dim_head": 8}


def tiny_language_model(layers: int = 4, **options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def tiny_flamingo(seed: int = 0, lm: torch.nn.Module | None = None, perceiver: dict | None = None, **options):
    """A Flamingo in eval mode with open gates, so that its bridge affects the logits."""
    torch.manual_seed(seed)
    lm = lm or tiny_language_model()
    config = FlamingoConfig(
        text_config=lm.config,
        perceiver={**PERCEIVER, **(perceiver or {})},
        cross_attention={"heads": 2, "dim_head": 8},
        media_token_id=MEDIA,
        eoc_token_id=EOC,
        **{
            "vision_config": VISION_CONFIG,
            "vision_width": VISION_WIDTH,
            "new_token_ids": [MEDIA, EOC],
            **options,
        },
    )
    model = FlamingoForConditionalGeneration(config, lang_encoder=lm).eval()
    open_gates(model)
    return model


@torch.no_grad()
def open_gates(model: torch.nn.Module, value: float = 1.0) -> None:
    for block in model.gated_cross_attn_layers:
        if block is not None:
            block.attn_gate.fill_(value)
            block.ff_gate.fill_(value)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random pixels (*shape, 3, 16, 16)."""
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def ids(*rows: str) -> torch.Tensor:
    """Rows of text to ids: ``I`` is an image, letters are words."""
    return torch.tensor([[MEDIA if c == "I" else ord(c) - ord("a") + 10 for c in row] for row in rows])
