"""Tiles: the grid of an image, its views, and what the model makes of them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flamingo_ft.adapters import Adapters, load_adapter, save_adapter
from flamingo_ft.backbones.tower import to_picture
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.attention_maps import attention_maps, record_attention
from flamingo_ft.model.tiles import UNTILED, Tiling
from flamingo_ft.model.views import Views, stack_media

from .nano import nano_flamingo
from .tiny import VISION_WIDTH, ids, tiny_flamingo

TOKENS = 4  # of each view


# Grids

TOWER_SIZES = st.sampled_from([(7, 7), (224, 224), (64, 32)])


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(2, 9),
    st.sampled_from([(7, 7), (224, 224), (64, 32)]),
)
def test_no_other_grid_keeps_more_of_an_image_or_as_much_with_fewer_tiles(width, height, most, tower):
    def kept(grid) -> Fraction:
        rows, columns = grid
        return min(Fraction(1), Fraction(rows * tower[0], height), Fraction(columns * tower[1], width))

    rows, columns = grid = Tiling(most).grid(width, height, tower)
    assert rows * columns <= most
    for other in ((r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most):
        assert kept(other) <= kept(grid) or kept(other) - kept(grid) < Fraction(1, 10**8)
        assert kept(other) < kept(grid) or other[0] * other[1] >= rows * columns


@pytest.mark.parametrize(
    "size, grid",
    [
        ((224, 224), (1, 1)),
        ((225, 100), (1, 2)),
        ((1000, 300), (1, 4)),
        ((600, 1200), (3, 2)),
        ((90, 400), (2, 1)),
    ],
)
def test_the_grid_follows_the_shape_of_the_image(size, grid):
    assert Tiling(6).grid(*size, (224, 224)) == grid


def test_smaller_tiles_enlarge_the_image():
    assert Tiling(6, tile_pixels=112).grid(224, 224, (224, 224)) == (2, 2)


# Views


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def nano(tiling: Tiling, **perceiver):
    model, processor = nano_flamingo({"depth": 0} | perceiver)
    processor.image_processor.tiles = tiling.to_dict()
    return model, processor


@pytest.fixture(scope="module")
def tiled():
    model, processor = nano(Tiling(4), max_tiles=4)
    with torch.no_grad():
        model.perceiver.tile_embs.normal_()
    return model, processor


def test_tiles_put_together_are_the_image(tiled):
    images = tiled[1].image_processor
    height, width = images.input_size
    image = picture(2 * width, 2 * height)  # nothing is scaled
    views = images.views(image)
    assert views.grid == (2, 2) and len(views) == 5
    rows = [torch.cat([*views.values[first : first + 2]], dim=-1) for first in (1, 3)]
    shown = to_picture(images.open_clip_preprocess, torch.cat(rows, dim=-2))
    assert np.array_equal(shown.numpy(), np.asarray(image))
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    assert torch.equal(views.values[0], images.transform(whole))


def test_nothing_of_a_long_image_is_cut_off():
    _, processor = nano(Tiling(2))
    images = processor.image_processor
    height, width = images.input_size
    image = Image.new("RGB", (2 * width, height // 4), "white")
    image.paste("red", (0, 0, 2, height))
    image.paste("blue", (2 * width - 2, 0, 2 * width, height))
    views = images.views(image)
    assert views.grid == (1, 2)
    red, blue = views.values[1, :, height // 2, 0], views.values[2, :, height // 2, -1]
    assert red[0] > red[2] and blue[2] > blue[0]


def test_a_small_image_is_one_view_and_a_batch_says_which_views_are_real(tiled):
    _, processor = tiled
    height, width = processor.image_processor.input_size
    small, large = picture(width // 2, height), picture(2 * width, height)
    batch = processor(
        [[small], [large, small]], ["<image>a", "<image>b<image>"], padding=True, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (2, 2, 3, 3, height, width)
    assert batch["frame_counts"].tolist() == [[1, 0], [3, 1]]
    assert batch["tile_grids"].tolist() == [[[1, 1], [1, 1]], [[1, 2], [1, 1]]]
    assert batch["input_ids"].eq(processor.image_token_id).sum() == 3  # one marker for each image
    plain = processor(small, "<image>a", return_tensors="pt")
    assert plain["pixel_values"].shape == (1, 1, 3, height, width) and "tile_grids" not in plain


# The model


def medium(grid, seed: int, whole: bool = True) -> Views:
    count = 1 if grid == UNTILED else grid[0] * grid[1] + whole
    generator = torch.Generator().manual_seed(seed)
    return Views(torch.randn(count, TOKENS, VISION_WIDTH, generator=generator), grid)


def inputs_of(*rows: list[Views]) -> dict[str, torch.Tensor]:
    batch = stack_media(rows, "vision_tokens")
    tokens = batch["vision_tokens"]
    return batch | {"vision_tokens": tokens if tokens.dim() == 5 else tokens[:, :, None]}


def flamingo(depth: int, **options):
    torch.manual_seed(0)
    model = tiny_flamingo(perceiver={"depth": depth, "max_tiles": 6, **options})
    torch.nn.init.normal_(model.perceiver.tile_embs)
    return model.eval()


DEPTHS = (0, 2)
LARGE, LONG, SMALL = medium((2, 2), 1), medium((1, 3), 2), medium(UNTILED, 3)


def test_without_a_perceiver_the_text_attends_to_the_tokens_of_all_views():
    model = flamingo(0)
    torch.nn.init.zeros_(model.perceiver.tile_embs)
    text = ids("aIbc")
    as_one_view = Views(LARGE.values.reshape(1, -1, VISION_WIDTH))
    expected = model(text, **inputs_of([as_one_view])).logits
    torch.testing.assert_close(model(text, **inputs_of([LARGE])).logits, expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_images_of_different_grids_in_a_batch_equal_each_alone(depth):
    model = flamingo(depth, max_num_media=2)
    rows = [[LARGE, SMALL], [SMALL, LONG], [medium((2, 1), 5, whole=False)]]
    texts = ids("aIbIc", "aIbIc", "abIcd")
    together = model(texts, **inputs_of(*rows)).logits
    for text, row, expected in zip(texts, rows, together, strict=True):
        torch.testing.assert_close(
            model(text[None], **inputs_of(row)).logits[0], expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("depth", DEPTHS)
def test_tiles_are_an_unordered_set_until_their_places_are_learned(depth):
    model, text = flamingo(depth), ids("aIbc")
    swapped = Views(LARGE.values[[0, 2, 1, 3, 4]], LARGE.grid)
    with_places = [model(text, **inputs_of([views])).logits for views in (LARGE, swapped)]
    assert not torch.allclose(*with_places, atol=1e-3)
    torch.nn.init.zeros_(model.perceiver.tile_embs)
    without = [model(text, **inputs_of([views])).logits for views in (LARGE, swapped)]
    torch.testing.assert_close(*without, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_places_are_a_row_and_a_column_in_units_of_the_tokens(depth):
    model = flamingo(depth)
    model.perceiver.tile_embs.data.mul_(torch.tensor([0.0] * 4 + [0] * 3 + [1, 0, 0, 0, 0, 0])[:, None])
    first, rest = model.perceiver.tile_embs[7], medium((1, 2), 4, whole=False)
    scale = rest.values.square().mean().sqrt()
    moved = Views(rest.values + scale * torch.stack([first, torch.zeros_like(first)])[:, None], (1, 2))
    text = ids("aIbc")
    with_places = model(text, **inputs_of([rest])).logits
    torch.nn.init.zeros_(model.perceiver.tile_embs)
    torch.testing.assert_close(model(text, **inputs_of([moved])).logits, with_places)
    model.perceiver.tile_embs.data.normal_()
    larger = Views(1000 * LARGE.values, LARGE.grid)  # another tower's scale; LayerNorm removes it
    if depth == 0:
        both = [model(text, **inputs_of([views])).logits for views in (LARGE, larger)]
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_a_video_beside_tiles_is_still_a_mean_of_frames():
    model = flamingo(0)
    torch.nn.init.zeros_(model.perceiver.tile_embs)
    video = Views(torch.randn(3, TOKENS, VISION_WIDTH))
    text = ids("aIbIc")
    expected = model(text, **inputs_of([LARGE, Views(video.values.mean(0, keepdim=True))])).logits
    torch.testing.assert_close(model(text, **inputs_of([LARGE, video])).logits, expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_image_of_another_grid_may_follow_in_a_later_turn(depth):
    model = flamingo(depth)
    first, second, whole = ids("aIb"), ids("cId"), ids("aIbcId")
    expected = model(whole, **inputs_of([SMALL, LARGE])).logits
    for media, later in (([SMALL], [LARGE]), ([SMALL], [SMALL, LARGE])):
        with torch.no_grad():
            start = model(first, **inputs_of(media), use_cache=True)
            end = model(second, **inputs_of(later), cache=start.past_key_values)
        torch.testing.assert_close(end.logits, expected[:, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_of_a_batch_equals_one_by_one(options):
    model, rows = flamingo(0), [[LARGE], [SMALL]]
    texts = ids("aIbc", "dIef")
    options = options | {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(input_ids=texts, **inputs_of(*rows), **options)
    for text, row, expected in zip(texts, rows, together, strict=True):
        assert (
            model.generate(input_ids=text[None], **inputs_of(row), **options)[0].tolist() == expected.tolist()
        )


def test_gradients_reach_the_embeddings_of_the_tiles_that_are_there():
    model = flamingo(0)
    model.requires_grad_(True)
    model(ids("aIbc"), **inputs_of([LONG]), labels=ids("aIbc")).loss.backward()
    reached = model.perceiver.tile_embs.grad.abs().sum(1) > 0
    whole, rows, columns = reached[:1], reached[1:7], reached[7:]
    assert (
        whole.all() and rows.tolist() == [True] + [False] * 5 and columns.tolist() == [True] * 3 + [False] * 3
    )


@pytest.mark.parametrize("depth", DEPTHS)
def test_attention_is_followed_to_every_view(depth):
    model = flamingo(depth)
    with torch.no_grad(), record_attention(model) as record:
        model(ids("aIbIc"), **inputs_of([SMALL, LARGE]))
    maps = attention_maps(record)
    assert maps.shape[1:] == (5, 2, 5, TOKENS)
    sums = maps.sum((-1, -2))
    torch.testing.assert_close(sums[:, 1:3, 0], torch.ones_like(sums[:, 1:3, 0]))
    torch.testing.assert_close(sums[:, 3:, 1], torch.ones_like(sums[:, 3:, 1]))
    assert maps[:, 1:3, 0, 1:].eq(0).all()  # views that the small image lacks
    assert maps[:, 3:, 1].amin() > 0 or depth == 0


WRONG = {
    "views that are not the grid's": (
        dict(tile_grids=torch.tensor([[[2, 3]]])),
        "2 x 3 tiles have 6 views, or one more .*got 4",
    ),
    "no grid for each medium": (dict(tile_grids=torch.ones(1, 2, 2)), r"must have shape \(1, 1, 2\)"),
    "more columns than were learned": (
        inputs_of([medium((1, 7), 0, whole=False)]),
        "max_tiles is 6, got 7 rows or columns of tiles",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_grid_that_does_not_fit_is_refused(wrong):
    values, message = WRONG[wrong]
    with pytest.raises(UserError, match=message):
        flamingo(0)(ids("aIb"), **inputs_of([LONG]) | values)


# Kept with the model


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    height, width = processor.image_processor.input_size
    image = picture(2 * width, 2 * height)
    return model(**processor(images=image, text="<image> Which digit?", return_tensors="pt")).logits


def test_an_adapter_and_a_saved_model_keep_their_tiles(tiled, tmp_path):
    expected = logits(*tiled)
    save_adapter(*tiled, tmp_path / "adapter")
    model, processor = load_adapter(tmp_path / "adapter")
    assert processor.image_processor.tiling == Tiling(4)
    assert torch.equal(logits(model, processor), expected)
    processor.image_processor.tiles = Tiling(4, tile_pixels=16).to_dict()
    save_adapter(model, processor, tmp_path / "smaller")
    with pytest.raises(UserError, match="smaller: the adapter divides images into other tiles"):
        Adapters(tmp_path / "adapter").load(tmp_path / "smaller", "second")
    tiled[0].save_pretrained(tmp_path / "model")
    saved = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(saved.eval(), tiled[1]), expected)
