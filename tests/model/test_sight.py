"""Tokens that attend in groups get what they get from one attention to all media, under a mask."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flamingo_ft.model.cross_attention import MaskedCrossAttention
from flamingo_ft.model.sight import Media, Sight, group_tokens

WIDTH, VISUAL, LATENTS = 8, 6, 5

sizes = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 3),
        "beams": st.integers(1, 3),
        "tokens": st.integers(1, 9),
        "media": st.integers(1, 4),
        "seed": st.integers(0, 2**31),
        "padded": st.booleans(),
        "tagged": st.booleans(),
        "views": st.booleans(),
    }
)


def sight_of(samples, beams, tokens, media, seed, padded, tagged, views) -> Sight:
    """Random media, and tokens of which each sees one or none; of tags, one view."""
    dice = torch.Generator().manual_seed(seed)
    rows = samples * beams
    medium = torch.randint(-1, media, (rows, tokens), generator=dice)
    shape = samples, media, LATENTS
    encoded = Media(
        torch.randn(*shape, VISUAL, generator=dice, dtype=torch.float64),
        torch.full((samples,), media),
        torch.randint(1, LATENTS + 1, shape[:2], generator=dice) if padded else None,
        torch.randint(-1, 3, shape, generator=dice) if views else None,
    )
    tags = torch.randint(-1, 4, (rows, tokens), generator=dice) if tagged else None
    return Sight(encoded, medium[..., None] == torch.arange(media), tags, one_medium=True)


def attended(attention: MaskedCrossAttention, x: torch.Tensor, sight: Sight) -> list[torch.Tensor]:
    """Return the output, and the gradients of parameters, text and latents."""
    latents = sight.media.latents.detach().requires_grad_()
    output = attention(x, *attention.project(latents), sight)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), [*attention.parameters(), x, latents])]


@settings(max_examples=60, deadline=None)
@given(sizes)
@example(dict(samples=1, beams=1, tokens=1, media=4, seed=0, padded=False, tagged=False, views=False))
@example(dict(samples=2, beams=3, tokens=1, media=2, seed=1, padded=True, tagged=True, views=True))
def test_groups_attend_as_one_masked_attention_does(size):
    sight = sight_of(**size)
    everything = Sight(sight.media, sight.seen, sight.tags, one_medium=False)
    torch.manual_seed(0)
    attention = MaskedCrossAttention(WIDTH, VISUAL, heads=2, dim_head=3).double()
    x = torch.randn(*sight.seen.shape[:2], WIDTH, dtype=torch.float64, requires_grad=True)
    assert everything.groups is None
    for actual, expected in zip(*(attended(attention, x, one) for one in (sight, everything)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=60))
def test_every_token_is_in_the_group_of_its_medium_and_less_than_half_of_a_group_is_padding(medium):
    grouped = {}
    for group in group_tokens(torch.tensor(medium)):
        padded = group.pad(group.tokens)
        real = torch.ones_like(padded, dtype=torch.bool) if group.real is None else group.real
        assert real.sum() > real.numel() / 2 and torch.equal(group.unpad(padded), group.tokens)
        for one, row, kept in zip(torch.arange(7)[group.media].tolist(), padded, real, strict=True):
            grouped |= dict.fromkeys(row[kept].tolist(), one)
    assert grouped == {token: one for token, one in enumerate(medium) if one >= 0}


def test_no_token_that_sees_a_medium_gives_zero_and_gradients_of_zero():
    sight = sight_of(2, 1, 4, 2, 0, padded=False, tagged=False, views=False)
    sight.seen = torch.zeros_like(sight.seen)
    attention = MaskedCrossAttention(WIDTH, VISUAL, heads=2, dim_head=3).double()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert all(not tensor.any() for tensor in attended(attention, x, sight))
