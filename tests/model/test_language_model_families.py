"""Every causal language model of transformers works with the bridge: zero gates change nothing, open ones do.

One tiny random model per family; a family that fails, fails its tests. The families that cannot pass are in
`tiny_language_models.LEFT_OUT`, each with its reason; the terminal summary repeats them.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from flamingo_ft.backbones.decoder_layers import UNSUPPORTED
from flamingo_ft.backbones.tower import build_visual
from flamingo_ft.model.open_flamingo import Flamingo

from .tiny import VISION_CONFIG, VISION_WIDTH, images, open_gates
from .tiny_language_models import FAMILIES, KNOWN, LEFT_OUT, make_tiny

VOCABULARY, MEDIA, EOC = 128, 126, 127
TEXT = torch.tensor([[3, MEDIA, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, MEDIA, 24, 25, 26, 27, 28]])
MASK = torch.ones_like(TEXT)
BEFORE = 1  # tokens before the first image of any row


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Tiny models are unusual, and transformers says so at length."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def visual() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_visual(VISION_CONFIG).eval().requires_grad_(False)


def flamingo_of(lm: PreTrainedModel, visual: torch.nn.Module) -> Flamingo:
    small = {"heads": 2, "dim_head": 8}
    perceiver = {"num_latents": 2, "depth": 1, **small}
    return Flamingo(visual, lm, EOC, MEDIA, VISION_WIDTH, perceiver=perceiver, cross_attention=small).eval()


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


# Widely used families, and one of every kind of layer and cache. The tests of the others are slow.
COMMON = {
    "bamba", "bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox",
    "gptj", "jamba", "llama", "mamba", "mamba2", "mistral", "mixtral", "mpt", "olmo", "opt", "phi", "phi3",
    "qwen2", "qwen3", "qwen3_next", "recurrent_gemma", "rwkv", "smollm3", "stablelm", "starcoder2", "xglm",
    "xlstm", "zamba2",
}  # fmt: skip


def common_first(families) -> list:
    """The families as parameters, the uncommon ones marked slow."""
    return [
        family if family in COMMON else pytest.param(family, marks=pytest.mark.slow) for family in families
    ]


@pytest.mark.parametrize("family", common_first(FAMILIES))
@torch.no_grad()
def test_zero_gates_leave_the_language_model_unchanged(family, visual):
    lm = make_tiny(family, vocab_size=VOCABULARY)
    four_tokens = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    four_tokens["eos_token_id"] = lm.generation_config.eos_token_id
    prompt = {"input_ids": TEXT, "attention_mask": MASK, "use_cache": False}  # Flamingo.forward's default
    plain = lm(**prompt).logits
    # A Flamingo never generates its media token, so the plain model must not either.
    plain_text = lm.generate(TEXT, suppress_tokens=[MEDIA], **four_tokens)

    model, pixels = flamingo_of(lm, visual), images(2, 1, 1)
    assert torch.equal(model(pixels, TEXT, MASK).logits, plain)
    assert torch.equal(model.generate(pixels, TEXT, **four_tokens), plain_text)
    assert torch.equal(lm(**prompt).logits, plain), "the hooks outlive the forward"

    open_gates(model)
    with_image = model(pixels, TEXT, MASK).logits
    with_another = model(images(2, 1, 1, seed=1), TEXT, MASK).logits
    assert largest(with_image - plain) > 1e-3, "the bridge is not in the path"
    assert largest(with_image[:, BEFORE:] - with_another[:, BEFORE:]) > 1e-5, "the image has no effect"
    # Experts and chunked kernels mix rows and tokens in their summation order, hence not exactly zero.
    assert largest(with_image[:, :BEFORE] - with_another[:, :BEFORE]) < 1e-6, (
        "an image changes text before it"
    )


@pytest.mark.parametrize("family", common_first(FAMILIES))
def test_every_bridge_parameter_gets_a_gradient(family, visual):
    model = flamingo_of(make_tiny(family, vocab_size=VOCABULARY).requires_grad_(False), visual)
    open_gates(model)
    model.train()
    model(images(2, 1, 1), TEXT, MASK).logits.square().mean().backward()
    bridge = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in bridge} == {"perceiver", "gated_cross_attn_layers"}
    assert not [name for name, gradient in bridge.items() if gradient is None or not gradient.any()]


# Families whose cached generation cannot be compared with uncached generation, and why.
NO_CACHE_TO_COMPARE = {
    "blt": "its cache asks the configuration for a layer count that it does not have",
    "rwkv": "cached and uncached generation differ without a bridge too",
}


@pytest.mark.parametrize("family", common_first(one for one in FAMILIES if one not in NO_CACHE_TO_COMPARE))
@torch.no_grad()
def test_cached_generation_equals_uncached_generation(family, visual):
    model = flamingo_of(make_tiny(family, vocab_size=VOCABULARY), visual)
    open_gates(model)
    eos = model.lang_encoder.generation_config.eos_token_id
    options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "eos_token_id": eos}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    pixels = images(2, 1, 1)
    cached = model.generate(pixels, TEXT, MASK, use_cache=True, **options)
    uncached = model.generate(pixels, TEXT, MASK, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    for step, expected in zip(cached.logits, uncached.logits, strict=True):
        assert largest(step - expected) < 1e-5


def test_at_least_150_families_are_tested():
    assert len(FAMILIES) >= 150


def test_every_known_family_is_tested_or_left_out_for_a_stated_reason():
    assert {*FAMILIES, *LEFT_OUT} == {*KNOWN}
    assert all(LEFT_OUT.values()) and {*LEFT_OUT} >= {*UNSUPPORTED}


def test_the_common_families_are_tested():
    assert {*FAMILIES} >= COMMON and {*FAMILIES} >= {*NO_CACHE_TO_COMPARE}
