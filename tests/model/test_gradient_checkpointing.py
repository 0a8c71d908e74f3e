"""Gradient checkpointing: the same gradients, fewer saved activations."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from .tiny import ids, images, tiny_flamingo

TEXT, PIXELS = ids("aIbIc", "dIefg"), images(2, 2)
MODES = [{"use_reentrant": False}, {"use_reentrant": True}]


def gradients(model, pixels=PIXELS, text=TEXT):
    model.train()
    model.zero_grad(set_to_none=True)
    model(text, pixels, labels=text).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def trainable(*prefixes, **options):
    model = tiny_flamingo(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "parts",
    [("perceiver", "gated_cross_attn_layers", "token_rows"), ("gated_cross_attn_layers",), ("perceiver",)],
)
def test_gradients_with_checkpointing_equal_those_without(mode, every, parts):
    model = trainable(*parts, cross_attn_every_n_layers=every)
    expected = gradients(model)
    model.activation_checkpointing_enable(mode)
    actual = gradients(model)
    assert expected and all(
        gradient is not None and gradient.abs().max() > 0 for gradient in expected.values()
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("part", ["language model", "cross-attention", "perceiver"])
def test_checkpointing_any_part_saves_activation_memory(part):
    model = trainable("perceiver", "gated_cross_attn_layers")
    before = saved_bytes(model)
    blocks = {
        "language model": model.lang_encoder.model.layers,
        "cross-attention": model.gated_cross_attn_layers,
        "perceiver": model.perceiver.layers,
    }[part]
    model.activation_checkpointing_enable()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and module not in set(blocks):
            module.gradient_checkpointing = False
    assert saved_bytes(model) < 0.9 * before


def saved_bytes(model) -> int:
    """Bytes of activations that one forward keeps for its backward, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(TEXT.repeat(4, 4), PIXELS.repeat(4, 4, 1, 1, 1), labels=TEXT.repeat(4, 4)).loss
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_batch_without_images_gives_every_parameter_a_gradient(mode):
    model = trainable("perceiver", "gated_cross_attn_layers", "token_rows")
    if mode:
        model.activation_checkpointing_enable(mode)
    actual = gradients(model, None, ids("abc", "def"))
    assert all(gradient is not None for gradient in actual.values())
    unseen = [g for name, g in actual.items() if name.startswith("perceiver.") or ".to_kv." in name]
    assert unseen and all((gradient == 0).all() for gradient in unseen)


def test_only_declared_parameters_change_in_a_step():
    model = trainable("gated_cross_attn_layers.1.", "token_rows.input")
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_one_step_of_eight_equals_eight_accumulated_steps_of_one():
    text, pixels = TEXT.repeat(4, 1), images(8, 2)
    model = trainable("perceiver", "gated_cross_attn_layers", "token_rows").double()
    whole = gradients(model, pixels.double(), text)
    model.zero_grad(set_to_none=True)
    tokens = text[:, 1:].numel()
    for row in range(8):
        out = model(
            text[row : row + 1],
            pixels[row : row + 1].double(),
            labels=text[row : row + 1],
            num_items_in_batch=tokens,
        )
        out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mode", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_a_checkpoint_wrapper_that_would_lose_the_gradient_is_refused(mode):
    model = trainable("gated_cross_attn_layers")
    layers = tuple(model.lang_encoder.model.layers)
    apply_activation_checkpointing(
        model, lambda module: checkpoint_wrapper(module, mode), check_fn=lambda module: module in layers
    )
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="activation_checkpointing_enable"):
        gradients(model)
