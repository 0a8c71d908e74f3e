"""Attention maps: against attention written out in float64, and laws of where text can look."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from flamingo_ft.errors import UserError
from flamingo_ft.model.attention_maps import attention_maps, record_attention, rollout
from flamingo_ft.model.cross_attention import MaskedCrossAttention
from flamingo_ft.model.perceiver import PerceiverAttention

from ..thinned import slow
from .tiny import VISION_WIDTH, ids, images, tiny_flamingo

TEXT = ids("abIcdIef")  # words before any image, and after each of two
DEPTHS = [0, 1, 2]


def visual_tokens(media: int = 2, frames: int = 1, tokens: int = 5, seed: int = 0) -> Tensor:
    """Random tokens (1, M, F, V, D) in place of a tower's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, media, frames, tokens, VISION_WIDTH, generator=generator)


def model_of(depth: int = 2, visibility: str = "all_preceding", **options):
    return tiny_flamingo(perceiver={"depth": depth}, media_visibility=visibility, **options)


@torch.no_grad()
def maps_of(model, tokens: Tensor, text: Tensor = TEXT, **options) -> Tensor:
    """(K, T, M, F, V)"""
    with record_attention(model) as record:
        model(text, vision_tokens=tokens.to(model.dtype), **options)
    return attention_maps(record)


# Against other computations


def lora(model):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_kv", "to_out"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def quantized(folder, **options):
    tiny_flamingo().save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options)
    )


VARIANTS = {
    "fp32": lambda folder: model_of(),
    "without perceiver": lambda folder: model_of(0, "immediate"),
    "bf16": lambda folder: model_of().to(torch.bfloat16),
    "LoRA": lambda folder: lora(model_of()),
    "nf4": lambda folder: quantized(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": lambda folder: quantized(folder, load_in_8bit=True),
}


@pytest.mark.parametrize("variant", [*list(VARIANTS)[:5], slow("int8")])
def test_weights_times_values_are_the_output_of_every_attention_of_the_bridge(variant, tmp_path):
    model = VARIANTS[variant](tmp_path)
    pairs: list[tuple[Tensor, Tensor]] = []

    def compare(attention, args, output):
        if isinstance(attention, MaskedCrossAttention):
            x, key, value, sight = args
            value = value.transpose(1, 2).flatten(2, 3)  # all media side by side
            weights = attention.weights(x, key, sight)
        else:
            tokens, latents = args
            seen = torch.cat([attention.norm_media(tokens), attention.norm_latents(latents)], 1)
            value = attention.to_kv(seen).chunk(2, -1)[1].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            weights = attention.weights(*args)
        expected = attention.to_out((weights @ value.float()).transpose(1, 2).flatten(2).to(output.dtype))
        pairs.append((output.float().view_as(expected), expected.float()))

    for module in model.modules():
        if isinstance(module, (MaskedCrossAttention, PerceiverAttention)):
            module.register_forward_hook(compare)
    with torch.no_grad():
        model(input_ids=TEXT, pixel_values=images(1, 2))
    assert len(pairs) >= 4
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if variant == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, **tolerance)


def softmax_of(query: Tensor, key: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)), the mean over heads: query (Q, h d), key (K, h d), seen (Q, K) -> (Q, K)."""
    query, key = (x.unflatten(-1, (heads, -1)) for x in (query, key))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    powers = scores.exp() if seen is None else scores.exp() * seen
    total = powers.sum(-1, keepdim=True)
    return torch.where(total > 0, powers / total, 0.0).mean(0)


def rolled_out(layers: list[Tensor], patches: int) -> Tensor:
    """Attention rollout as the product of whole matrices over patches and latents: (L, P)."""
    size = patches + len(layers[0])
    product = torch.eye(size, dtype=torch.float64)
    for weights in layers:
        layer = torch.eye(size, dtype=torch.float64)  # patches stay what they are
        layer[patches:] = (layer[patches:] + weights) / 2
        product = layer @ product
    held = product[patches:, :patches]
    return held / held.sum(-1, keepdim=True)


def expected_maps(model, tokens: Tensor) -> Tensor:
    """What `maps_of` must give, in float64, from the inputs of each attention."""
    inputs: list[tuple] = []
    for module in model.modules():
        if isinstance(module, (MaskedCrossAttention, PerceiverAttention)):
            module.register_forward_pre_hook(lambda module, args: inputs.append((module, args)))
    with torch.no_grad():
        model(TEXT, vision_tokens=tokens)
        media, frames, per_frame = tokens.shape[1:4]
        patches, reads, blocks = frames * per_frame, [[] for _ in range(media)], []
        for module, args in inputs:
            if isinstance(module, PerceiverAttention):
                for own, visual, latents in zip(reads, *args, strict=True):
                    latents = module.norm_latents(latents)
                    seen = torch.cat([module.norm_media(visual), latents])
                    keys = module.to_kv(seen).chunk(2, -1)[0]
                    own.append(softmax_of(module.to_q(latents), keys, module.heads))
            else:
                x, key, _, sight = args
                keys, queries = (
                    key[0].transpose(1, 2).flatten(0, 1).flatten(1),
                    module.to_q(module.norm(x[0])),
                )
                seen = sight.seen[0].repeat_interleave(len(keys) // media, -1)
                blocks.append(softmax_of(queries, keys, module.heads, seen))
    held = torch.eye(per_frame, dtype=torch.float64).repeat(media, 1, frames) / frames
    if reads[0]:
        held = torch.stack([rolled_out(own, patches) for own in reads])
    whole = torch.stack([block.unflatten(-1, (media, -1)) for block in blocks])
    return torch.einsum("ktml,mlp->ktmp", whole, held).unflatten(-1, (frames, per_frame))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("visibility", ["immediate", "all_preceding"])
def test_maps_equal_attention_written_out_in_float64(depth, visibility):
    model, tokens = model_of(depth, visibility).double(), visual_tokens(frames=2).double()
    actual = maps_of(model, tokens)
    torch.testing.assert_close(actual.double(), expected_maps(model, tokens), rtol=1e-4, atol=1e-6)


def test_with_one_layer_the_rollout_is_the_attention_to_patches_renormalized():
    weights = torch.rand(2, 3, 8).softmax(-1)
    patches = weights[..., :5]
    torch.testing.assert_close(rollout([weights]), patches / patches.sum(-1, keepdim=True))


def test_latents_that_read_only_each_other_pass_on_what_they_read_before():
    first = torch.tensor([[[1.0, 0.0, 0, 0], [0.0, 1.0, 0, 0]]])  # each latent reads a patch of its own
    second = torch.tensor([[[0, 0, 0, 1.0], [0, 0, 1.0, 0]]])  # and then the other latent
    torch.testing.assert_close(rollout([first, second]), torch.full((1, 2, 2), 0.5))


# Where text can look


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        # text:           a  b  I  c  d  I  e  f             a  b  I  c  d  I  e  f
        ("immediate", [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]),
        ("all_preceding", [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]),
        ("following", [1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]),
    ],
)
def test_weights_sum_to_one_over_the_media_that_a_token_sees_and_are_zero_elsewhere(
    mode, first, second, depth
):
    maps = maps_of(model_of(depth, mode), visual_tokens())
    seen = torch.tensor([first, second]).T  # (T, M)
    torch.testing.assert_close(maps.sum((2, 3, 4)), seen.any(-1).float().expand(len(maps), -1))
    assert ((maps > 0) == seen[None, :, :, None, None].bool()).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_permuted_patches_permute_the_map(depth):
    model, tokens, order = model_of(depth), visual_tokens(), torch.tensor([3, 0, 4, 2, 1])
    actual = maps_of(model, tokens[..., order, :])
    torch.testing.assert_close(actual, maps_of(model, tokens)[..., order])


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_patch_that_is_there_twice_gets_equal_weights(depth):
    tokens = visual_tokens()
    tokens[..., 3, :] = tokens[..., 1, :]
    maps = maps_of(model_of(depth), tokens)
    torch.testing.assert_close(maps[..., 3], maps[..., 1])
    assert not torch.allclose(maps[..., 2], maps[..., 1])


def test_an_image_that_is_there_twice_is_looked_at_twice_alike():
    tokens = visual_tokens()
    tokens[:, 1] = tokens[:, 0]
    after_both = maps_of(model_of(), tokens)[:, 5:]
    torch.testing.assert_close(after_both[:, :, 0], after_both[:, :, 1])


def test_without_a_perceiver_all_frames_of_a_video_get_equal_weights():
    maps = maps_of(model_of(0), visual_tokens(frames=3))
    torch.testing.assert_close(maps, maps[..., :1, :].expand_as(maps))
    assert maps_of(model_of(2), visual_tokens(frames=3)).std(3).amax() > 1e-4


@pytest.mark.parametrize("depth", DEPTHS)
def test_media_of_different_lengths_keep_their_own_maps(depth):
    """They are resampled in groups of one length, which must not mix up their order."""
    tokens = visual_tokens(media=3, frames=3)
    text, counts = ids("IaIbIc"), torch.tensor([[3, 1, 3]])
    model = model_of(depth)
    mixed = maps_of(model, tokens, text, frame_counts=counts)
    assert mixed.shape == (4, 6, 3, 3, 5) and (mixed[:, :, 1, 1:] == 0).all()
    torch.testing.assert_close(mixed[:, -1].sum((1, 2, 3)), torch.ones(4))
    with record_attention(model) as record, torch.no_grad():
        model(text, vision_tokens=tokens, frame_counts=counts)
    for medium, length in enumerate([3, 1, 3]):
        with record_attention(model) as alone, torch.no_grad():
            model(ids("Ia"), vision_tokens=tokens[:, medium : medium + 1, :length])
        (call,) = (call for call in record.perceiver if medium in call.slots)
        own = call.latent_maps()[call.slots.tolist().index(medium)]
        torch.testing.assert_close(own, alone.perceiver[0].latent_maps()[0])


# The forward is left as it is


def hooks_of(model) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_forward_before_while_and_after_recording_gives_the_same_bits(depth):
    model, pixels = model_of(depth), images(1, 2)
    before, hooks = model(TEXT, pixels).logits, hooks_of(model)
    with record_attention(model):
        assert hooks_of(model) != hooks
        assert torch.equal(model(TEXT, pixels).logits, before)
    assert hooks_of(model) == hooks
    assert torch.equal(model(TEXT, pixels).logits, before)


def test_nothing_is_left_on_the_model_after_an_error():
    model = model_of()
    hooks = hooks_of(model)
    with pytest.raises(UserError, match="row 0 has 2 <image> tokens but 1 image"), record_attention(model):
        model(TEXT, images(1, 1))
    assert hooks_of(model) == hooks and not model.conditioning.is_open


def test_gradients_flow_while_attention_is_recorded():
    model = model_of().requires_grad_(True)
    model(TEXT, images(1, 2)).logits.sum().backward()
    expected = model.gated_cross_attn_layers[0].attn.to_q.weight.grad.clone()
    model.zero_grad()
    with record_attention(model) as record:
        model(TEXT, images(1, 2)).logits.sum().backward()
    assert torch.equal(model.gated_cross_attn_layers[0].attn.to_q.weight.grad, expected)
    assert not attention_maps(record).requires_grad


def test_weights_are_computed_in_float32_under_autocast():
    model, tokens = model_of(), visual_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        maps = maps_of(model, tokens)
    sums = maps[:, 2:].sum((2, 3, 4))
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_is_recorded():
    model, tokens = model_of(), visual_tokens()
    expected = maps_of(model, tokens)
    model.lang_encoder.compile(backend="eager")
    with torch.no_grad():
        model(TEXT, vision_tokens=tokens)
    torch.testing.assert_close(maps_of(model, tokens), expected)


@torch.no_grad()
def test_forwards_of_other_threads_are_not_recorded():
    model = model_of()
    expected = maps_of(model, visual_tokens())
    with record_attention(model) as record:
        model(TEXT, vision_tokens=visual_tokens())
        other = threading.Thread(target=maps_of, args=(model, visual_tokens(seed=1)))
        other.start()
        other.join()
    assert torch.equal(attention_maps(record), expected) and len(record.perceiver) == 1


def test_blocks_are_recorded_under_the_decoder_layer_that_follows_them():
    model = model_of(cross_attn_every_n_layers=2)
    with record_attention(model) as record:
        model(TEXT, images(1, 2))
    assert list(record.blocks) == [1, 3]


def test_several_rows_and_text_without_media_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match="got 2 rows of text"), record_attention(model):
        model(TEXT.expand(2, -1), images(2, 2))
    with record_attention(model) as record, torch.no_grad():
        model(ids("abc"))
    with pytest.raises(ValueError, match="no cross-attention was recorded"):
        attention_maps(record)
