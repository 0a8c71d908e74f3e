"""Attention in float32 where bfloat16 gradients are slow: the same values, and nothing else changes."""

import pytest
import torch
from torch.nn import functional

from flamingo_ft.backbones.cpu_attention import MAX_QUERIES, float32_attention_on_cpu

BF16 = torch.bfloat16


def heads(queries, keys, dtype=BF16, requires_grad=True):
    """Return query (2, 3, Q, 8), key and value (2, 3, K, 8)."""
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(2, 3, size, 8).to(dtype).requires_grad_(requires_grad) for size in sizes]


def gradients(inputs, **options):
    output = functional.scaled_dot_product_attention(*inputs, **options)
    return output, torch.autograd.grad(output.float().square().sum(), inputs)


MASKS = {
    "no mask": lambda: {},
    "causal": lambda: {"is_causal": True},
    "added": lambda: {"attn_mask": torch.randn(2, 1, 6, 6).to(BF16)},
    "boolean": lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()},
}


@pytest.mark.parametrize("mask", MASKS)
def test_outputs_and_gradients_are_those_of_float64_within_one_rounding(mask):
    inputs, options = heads(6, 6), MASKS[mask]()
    exact = {name: value.double() if name == "attn_mask" and value.is_floating_point() else value
             for name, value in options.items()}  # fmt: skip
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    # The loss squares the output, whose rounding to bfloat16 is part of its gradient.
    rounded = functional.scaled_dot_product_attention(*wide, **exact)
    expected = torch.autograd.grad(rounded, wide, 2 * rounded.to(BF16).double())
    with float32_attention_on_cpu():
        output, found = gradients(inputs, **options)
    assert output.dtype == BF16 and all(gradient.dtype == BF16 for gradient in found)
    torch.testing.assert_close(output.double(), rounded, rtol=2**-8, atol=1e-5)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=2**-7, atol=2e-3)


def test_under_autocast_float32_inputs_give_a_bfloat16_output():
    inputs = heads(6, 6, torch.float32)
    with torch.autocast("cpu", BF16), float32_attention_on_cpu():
        output = functional.scaled_dot_product_attention(*inputs)
        assert torch.is_autocast_enabled("cpu")
    assert output.dtype == BF16
    torch.testing.assert_close(
        output.float(), functional.scaled_dot_product_attention(*inputs), rtol=2**-8, atol=1e-5
    )


@pytest.mark.parametrize(
    "inputs",
    [heads(6, 6, torch.float32), heads(6, 6, requires_grad=False), heads(MAX_QUERIES + 1, 6)],
    ids=["float32", "no gradient", "long"],
)
def test_other_attention_is_computed_as_without_the_context(inputs):
    expected = functional.scaled_dot_product_attention(*inputs)
    with float32_attention_on_cpu():
        assert torch.equal(functional.scaled_dot_product_attention(*inputs), expected)


def test_the_context_ends_with_an_error_too():
    original = functional.scaled_dot_product_attention
    with pytest.raises(RuntimeError), float32_attention_on_cpu():
        assert functional.scaled_dot_product_attention is not original
        functional.scaled_dot_product_attention(*heads(6, 6)[:2], torch.zeros(1))
    assert functional.scaled_dot_product_attention is original
