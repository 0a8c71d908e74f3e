"""With `max_num_media`, a medium is encoded at its position in its sample, cached or not."""

import copy

import pytest
import torch

from flamingo_ft.errors import UserError
from flamingo_ft.model import Flamingo
from flamingo_ft.model.language_model_inputs import get_cache
from flamingo_ft.model.media import media_input

from .test_packing import batches, gradients
from .tiny import (
    IMAGE_SIZE,
    MEDIA,
    PERCEIVER,
    VISION_WIDTH,
    ids,
    images,
    open_gates,
    tiny_flamingo,
    tiny_language_model,
)

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
MODES = ["immediate", "all_preceding"]


def flamingo(most: int = 4, mode: str = "immediate", **perceiver):
    """A model whose logits depend on the position of an image."""
    model = tiny_flamingo(perceiver={"max_num_media": most, **perceiver}, media_visibility=mode)
    with torch.no_grad():
        model.perceiver.media_time_embs.mul_(3)
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_position_of_an_image_changes_its_latents():
    """Otherwise the tests below would pass trivially."""
    model, pixels = flamingo(), images(1, 1).expand(-1, 2, -1, -1, -1)
    first, second = model.media_for(ids("II"), media_input(pixels)).latents[0]
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pixels_of", ["all turns", "the new turn"])
@torch.no_grad()
def test_turns_from_a_cache_have_the_logits_of_the_whole_dialogue(mode, pixels_of):
    model, pixels, turns = flamingo(mode=mode), images(1, 4), [ids("aIb"), ids("IcId"), ids("ef"), ids("Ig")]
    whole = model(torch.cat(turns, 1), pixels).logits
    parts, cache, seen = [], None, 0
    for turn in turns:
        new = int((turn == MEDIA).sum())
        media = pixels[:, seen : seen + new] if pixels_of == "the new turn" else pixels[:, : seen + new]
        out = model(turn, media if new else None, cache=cache, use_cache=True)
        cache, seen = get_cache(out), seen + new
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_left_padded_rows_continue_each_from_its_own_number_of_images(mode):
    model, pixels = flamingo(mode=mode), images(2, 3)
    first, second = ids("aIbIc", "zzzId"), ids("eIf", "gIh")
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    cache = get_cache(model(first, pixels[:, :2], attention_mask=mask, use_cache=True))
    mask = torch.cat([mask, torch.ones_like(second)], 1)
    new = torch.stack([pixels[0, 2:], pixels[1, 1:2]])
    actual = model(second, new, attention_mask=mask, cache=cache).logits
    for row, (before, count) in enumerate(((0, 3), (3, 2))):
        alone = torch.cat([first[row : row + 1, before:], second[row : row + 1]], 1)
        close(actual[row], model(alone, pixels[row : row + 1, :count]).logits[0, -3:])


@torch.no_grad()
def test_a_generated_dialogue_continues_from_its_cache_as_from_the_whole_text():
    model, pixels = flamingo(), images(1, 3)
    first = model.generate(ids("aIb"), pixel_values=pixels[:, :1], return_dict_in_generate=True, **GREEDY)
    second = torch.cat([first.sequences, ids("cIdI")], dim=1)
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(second, pixel_values=pixels, **options)
    for media in (pixels, pixels[:, 1:]):
        cache = copy.deepcopy(get_cache(first))
        actual = model.generate(second, pixel_values=media, cache=cache, **options)
        assert torch.equal(actual.sequences, whole.sequences)
        close(torch.stack(actual.logits), torch.stack(whole.logits))


@torch.no_grad()
def test_beams_continue_from_a_cache():
    model, pixels, prompt, rest = flamingo(), images(1, 2), ids("aIb"), ids("cId")
    options = GREEDY | {"num_beams": 3}
    whole = model.generate(torch.cat([prompt, rest], 1), pixel_values=pixels, **options)
    cache = get_cache(model(prompt, pixels[:, :1], use_cache=True))
    cache.batch_repeat_interleave(3)
    actual = model(rest.expand(3, -1), pixels[:, 1:].expand(3, -1, -1, -1, -1), cache=cache).logits
    expected = model(torch.cat([prompt, rest], 1), pixels).logits[:, 3:]
    close(actual, expected.expand(3, -1, -1))
    text = torch.cat([prompt, rest], 1)
    assert torch.equal(whole, model.generate(text, pixel_values=pixels, use_cache=False, **options))


@torch.no_grad()
def test_chunks_and_drafts_read_images_at_their_positions():
    model, tokens, pixels = flamingo(), ids("aIbcIdef"), images(1, 2)
    expected = model.generate(tokens, pixel_values=pixels, use_cache=False, **GREEDY)
    for options in (
        {"prefill_chunk_size": 3},
        {"assistant_model": flamingo()},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(model.generate(tokens, pixel_values=pixels, **options, **GREEDY), expected)


@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_assisted_decoding_from_a_cache_is_refused(draft):
    model, pixels = flamingo(), images(1, 2)
    cache = get_cache(model(ids("aIb"), pixels[:, :1], use_cache=True))
    options = {"assistant_model": flamingo()} if draft == "assistant" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(
        UserError, match="assisted decoding cannot continue from a cache, got one of 3 tokens"
    ):
        model.generate(ids("aIbcId"), pixel_values=pixels, cache=cache, **options, **GREEDY)


def test_more_images_than_positions_are_refused_over_turns_too():
    model, pixels = flamingo(most=2), images(1, 3)
    cache = get_cache(model(ids("aIbI"), pixels[:, :2], use_cache=True))
    for media in (pixels, pixels[:, 2:]):
        with pytest.raises(UserError, match="max_num_media is 2, got 3 media per sample"):
            model(ids("cI"), media, cache=cache)


@torch.no_grad()
def test_turns_of_videos_have_the_logits_of_the_whole_dialogue():
    model, videos, frames = flamingo(max_num_frames=3), images(1, 3, 3), torch.tensor([[3, 1, 2]])
    turns = ids("aIb"), ids("IcI")
    whole = model(torch.cat(turns, 1), videos, frame_counts=frames).logits
    cache = get_cache(model(turns[0], videos[:, :1], frame_counts=frames[:, :1], use_cache=True))
    rest = model(turns[1], videos[:, 1:], frame_counts=frames[:, 1:], cache=cache).logits
    close(rest, whole[:, 3:])


@pytest.mark.parametrize("mode", [*MODES, "following"])
def test_images_of_packed_samples_are_numbered_as_in_separate_rows(mode):
    model = flamingo(mode=mode).double().requires_grad_(True)
    apart, packed = batches()
    (loss, expected), (actual_loss, actual) = (gradients(model, batch, True) for batch in (apart, packed))
    torch.testing.assert_close(actual_loss, loss, rtol=1e-10, atol=0)
    name = "perceiver.media_time_embs"
    torch.testing.assert_close(actual[name], expected[name], rtol=1e-8, atol=1e-12)


def test_a_packed_row_may_have_more_images_than_max_num_media():
    _, packed = batches()
    flamingo(most=2).double()(**packed)
    packed.pop("document_ids")
    with pytest.raises(UserError, match="max_num_media is 2"):
        flamingo(most=2).double()(**packed)


# The OpenFlamingo API


def open_flamingo() -> Flamingo:
    torch.manual_seed(0)
    vision = tiny_flamingo().vision_encoder
    sizes = {"perceiver": {**PERCEIVER, "max_num_media": 4}, "cross_attention": {"heads": 2, "dim_head": 8}}
    model = Flamingo(vision, tiny_language_model(), 59, MEDIA, VISION_WIDTH, **sizes)
    open_gates(model)
    return model.eval()


def videos(count: int) -> torch.Tensor:
    return images(1, count, 1).reshape(1, count, 1, 3, IMAGE_SIZE, IMAGE_SIZE)


@torch.no_grad()
def test_turns_of_an_open_flamingo_have_the_logits_of_the_whole_dialogue():
    model, media, turns = open_flamingo(), videos(2), (ids("aIb"), ids("cId"))
    whole = model(media, torch.cat(turns, 1)).logits[:, 3:]
    cache = get_cache(model(media[:, :1], turns[0], use_cache=True))
    close(model(media[:, 1:], turns[1], past_key_values=copy.deepcopy(cache), use_cache=True).logits, whole)
    model.cache_media(torch.cat(turns, 1), media)
    cache = get_cache(model(None, turns[0], use_cache=True))
    close(model(None, turns[1], past_key_values=cache, use_cache=True).logits, whole)


@torch.no_grad()
def test_media_kept_by_a_forward_that_continues_a_cache_are_numbered_after_those_in_it():
    model, media, turns = open_flamingo(), videos(2), (ids("aIb"), ids("cId"))
    cache = get_cache(model(media[:, :1], turns[0], use_cache=True))
    model(media[:, 1:], turns[1], past_key_values=cache, use_cache=True, clear_conditioned_layers=False)
    actual = model(None, ids("ef")).logits  # text after both turns, without their cache
    model.uncache_media()
    model.cache_media(torch.cat(turns, 1), media)
    close(actual, model(None, ids("ef")).logits)
