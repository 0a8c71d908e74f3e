"""Which media a text token sees: an image that it does not see leaves its logits bit-equal."""

import pytest
import torch

from .tiny import ids, images, tiny_flamingo

MODES = ["immediate", "all_preceding", "following"]


def influence(model, text: str, media: int) -> torch.Tensor:
    """(M, T): whether changing image m changes the cross-attention's own output at token t, layer 0."""
    tokens, pixels = ids(text), images(1, media)
    seen = []
    block = model.gated_cross_attn_layers[0]
    block.attn.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(tokens, pixels)
    for m in range(media):
        changed = pixels.clone()
        changed[0, m] = images(1, 1, seed=m + 1)[0, 0]
        model(tokens, changed)
    return torch.stack([(other != seen[0]).any(-1)[0] for other in seen[1:]])


@pytest.mark.parametrize(
    ("mode", "sees_first", "sees_second"),
    [
        # text:           a I b I c                 a I b I c
        ("immediate", [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]),
        ("all_preceding", [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]),
        ("following", [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]),
    ],
)
def test_a_text_token_sees_exactly_the_media_of_its_mode(mode, sees_first, sees_second):
    actual = influence(tiny_flamingo(media_visibility=mode), "aIbIc", 2)
    assert actual.int().tolist() == [sees_first, sees_second]


@pytest.mark.parametrize("mode", MODES)
def test_text_with_no_image_to_see_ignores_images(mode):
    model = tiny_flamingo(media_visibility=mode)
    text = ids("abcI") if mode != "following" else ids("Iabc")
    alone = slice(0, 3) if mode != "following" else slice(1, 4)
    blind = []
    for block in model.gated_cross_attn_layers:
        block.attn.register_forward_hook(lambda m, args, output: blind.append(output[:, alone]))
    model(text, images(1, 1))
    assert all((output == 0).all() for output in blind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_padded_batch_equals_its_samples_alone(mode, side):
    model = tiny_flamingo(media_visibility=mode)
    texts, counts = ["aIbIcId", "ab", "Iabc", "aIbI"], [3, 0, 1, 2]
    pixels = images(len(texts), 3, seed=3)
    width = max(map(len, texts))
    rows, mask = (
        torch.zeros(len(texts), width, dtype=torch.long),
        torch.zeros(len(texts), width, dtype=torch.long),
    )
    positions = torch.zeros_like(rows)
    for row, text in enumerate(texts):
        span = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        rows[row, span], mask[row, span] = ids(text)[0], 1
        positions[row, span] = torch.arange(len(text))
    batch = model(rows, pixels, attention_mask=mask, position_ids=positions).logits
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        alone = model(ids(text), pixels[row : row + 1, :count] if count else None).logits
        torch.testing.assert_close(batch[row][mask[row].bool()], alone[0], rtol=1e-5, atol=1e-5)


def test_padded_media_do_not_affect_the_logits():
    model = tiny_flamingo()
    text, pixels = ids("aIb", "IbI"), images(2, 2)
    changed = pixels.clone()
    changed[0, 1] = float("nan")
    assert torch.equal(model(text, pixels).logits, model(text, changed).logits)


def test_several_frames_fill_one_slot():
    model = tiny_flamingo(perceiver={"max_num_frames": 4})
    video = images(1, 2, 3)
    reference = model(ids("IaIb"), video).logits
    for frame in range(3):
        changed = video.clone()
        changed[0, 1, frame] += 1
        logits = model(ids("IaIb"), changed).logits
        assert torch.equal(logits[:, :2], reference[:, :2])
        assert not torch.equal(logits[:, 2:], reference[:, 2:])


def test_the_order_of_frames_matters_only_with_frame_embeddings():
    video = images(1, 1, 3)
    for option, same in ((None, True), (3, False)):
        model = tiny_flamingo(perceiver={"max_num_frames": option})
        forth, back = (model(ids("Ia"), pixels).logits for pixels in (video, video.flip(2)))
        assert torch.allclose(forth, back, atol=1e-6) == same


def test_more_media_than_position_embeddings_are_refused():
    model = tiny_flamingo(perceiver={"max_num_media": 1})
    with pytest.raises(ValueError, match="max_num_media is 1"):
        model(ids("IaIb"), images(1, 2))


def test_more_markers_than_images_are_refused():
    with pytest.raises(ValueError, match="row 1 has 2 <image> tokens but 1 image"):
        tiny_flamingo()(ids("aIb", "IbI"), images(2, 1))


def test_markers_without_any_image_are_refused():
    with pytest.raises(ValueError, match="row 0 has 1 <image> tokens but 0 images"):
        tiny_flamingo()(ids("aIb"))


def test_pixels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values: .* got shape \(2, 3, 16, 16\)"):
        tiny_flamingo()(ids("aIb", "IbI"), images(2))
