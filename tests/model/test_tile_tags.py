"""Text tags of tiles: tokens after ``<image>``, each of which attends to one view."""

from __future__ import annotations

import pytest
import torch

from flamingo_ft import load_language
from flamingo_ft.adapters import load_adapter, save_adapter
from flamingo_ft.config import load_recipe
from flamingo_ft.data.encode import encode
from flamingo_ft.errors import UserError
from flamingo_ft.model.tile_tags import tile_tag_ids, tile_tags
from flamingo_ft.model.tiles import UNTILED, Tiling
from flamingo_ft.model.views import Views

from .nano import nano_flamingo
from .test_tiles import LARGE, LONG, SMALL, inputs_of, medium, picture
from .tiny import ids, tiny_flamingo

MAX = 4
TAGS = "uvwxy"  # of the whole image and of four tiles, in `ids`
TAG_IDS = ids(TAGS)[0].tolist()


def tagged(**options):
    return tiny_flamingo(perceiver={"depth": 0}, tile_tag_ids=TAG_IDS, **options)


# Tokens


@pytest.fixture(scope="module")
def parts():
    model, processor = nano_flamingo({"depth": 0}, tagged_tiles=MAX)
    processor.image_processor.tiles = Tiling(MAX).to_dict()
    with torch.no_grad():
        model.token_rows.input.weight.normal_()
    return model, processor


def chat(question: str, answer: list[dict]) -> list[dict]:
    image = {"type": "image", "image": picture(64, 32)}
    return [
        {"role": "user", "content": [image, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]


def test_every_image_is_followed_by_all_tags(parts):
    model, processor = parts
    tags, media = list(tile_tag_ids(processor.tokenizer)), processor.image_token_id
    assert (
        processor.tokenizer.convert_ids_to_tokens(tags)
        == tile_tags(MAX)
        == ["<tile_whole>"] + [f"<tile_{n}>" for n in range(1, MAX + 1)]
    )
    assert model.config.tile_tag_ids == tags and set(tags) <= set(model.config.new_token_ids)
    small = picture(16, 16)
    batch = processor([[small], [small] * 2], ["<image>a", "b<image><image>"], padding=True)
    for row, count in zip(batch["input_ids"], (1, 2), strict=True):
        places = [place for place, token in enumerate(row) if token == media]
        assert len(places) == count and all(row[place + 1 : place + 2 + MAX] == tags for place in places)
        assert sum(row.count(tag) for tag in tags) == count * len(tags)


@pytest.mark.parametrize("options", [{"truncation": True}, {"max_length": 9}], ids=str)
def test_truncation_counts_tags(options, parts, monkeypatch):
    _, processor = parts
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 9)
    whole = processor(picture(16, 16), "<image>" + "a " * 20)
    cut = processor(picture(16, 16), "<image>" + "a " * 20, **options)
    assert cut["input_ids"] == [whole["input_ids"][0][:9]] and len(whole["input_ids"][0]) > 20


def test_tags_have_no_labels_and_no_text(parts):
    _, processor = parts
    answer = [{"type": "image", "image": picture(32, 32)}, {"type": "text", "text": "seven"}]
    encoded = encode(processor, chat("digit", answer))
    special = processor.input_only_ids
    assert sum(token in special for token in encoded.input_ids) == 2 * (2 + MAX)
    trained = [label for label in encoded.labels if label >= 0]
    assert trained and not special & set(trained)
    without = [token for token in encoded.input_ids if token not in set(tile_tag_ids(processor.tokenizer))]
    plain = processor.tokenizer.decode(without)
    assert "seven" in plain and "<tile" not in plain


def test_a_tag_that_a_user_types_is_text(parts):
    _, processor = parts
    encoded = encode(processor, chat("<tile_2>", [{"type": "text", "text": "two"}]))
    assert encoded.input_ids.count(tile_tag_ids(processor.tokenizer)[2]) == 1  # that of the image
    assert "<tile_2>" in processor.tokenizer.decode(encoded.input_ids, skip_special_tokens=True)


# Attention


def first_block(model, text, media):
    """Return the output of the block before the first decoder layer, which has mixed no tokens yet."""
    kept = []
    handle = model.gated_cross_attn_layers[0].register_forward_hook(lambda *call: kept.append(call[2][0][0]))
    with torch.no_grad():
        model(text, **inputs_of(media))
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("visibility", ["immediate", "all_preceding", "following"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_tag_sees_its_view_and_nothing_else(whole, visibility):
    model, text = tagged(media_visibility=visibility), ids(f"I{TAGS}aI{TAGS}b")
    media = [medium((1, 3), 7, whole), medium((2, 2), 8, whole)]
    before = first_block(model, text, media)
    for number, image in enumerate(media):
        for view in range(len(image)):
            values = image.values.clone()
            values[view] = values[view].flip(-1)
            changed = [Views(values, image.grid) if one is image else one for one in media]
            differs = (first_block(model, text, changed) - before).abs().amax(-1) > 1e-6
            place = (8 if number else 1) + view + (not whole)
            seen = [p for p in range(14) if differs[p] and text[0, p].item() in TAG_IDS]
            assert seen == [place]
            assert differs.sum() > 1  # the words see all views


def test_images_in_one_view_belong_to_the_first_tag_and_other_tags_see_nothing():
    model, text = tagged(), ids(f"I{TAGS}a")
    changed = Views(SMALL.values.flip(-1), UNTILED)
    for other in ([SMALL], [changed]):
        blind = first_block(model, text, [SMALL])[2:6] - first_block(model, text, other)[2:6]
        assert blind.eq(0).all()
    assert not torch.equal(first_block(model, text, [SMALL])[1], first_block(model, text, [changed])[1])


def test_tags_of_images_of_different_grids_in_a_batch_equal_each_alone():
    model = tagged()
    rows = [[LARGE, SMALL], [SMALL, LONG], [medium((2, 1), 5, whole=False)] * 2, [SMALL, SMALL]]
    texts = ids(*[f"aI{TAGS}bI{TAGS}c"] * 4)
    together = model(texts, **inputs_of(*rows)).logits
    for text, row, expected in zip(texts, rows, together, strict=True):
        alone = model(text[None], **inputs_of(row)).logits[0]
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("media", [[SMALL, LARGE], [LARGE, SMALL], [LONG, LARGE], [SMALL, SMALL]])
def test_an_image_with_tags_may_follow_in_a_later_turn(media):
    model = tagged()
    first, second = ids(f"aI{TAGS}b"), ids(f"cI{TAGS}d")
    expected = model(torch.cat([first, second], dim=1), **inputs_of(media)).logits
    with torch.no_grad():
        start = model(first, **inputs_of(media[:1]), use_cache=True)
        end = model(second, **inputs_of(media[1:]), cache=start.past_key_values)
    torch.testing.assert_close(end.logits, expected[:, first.shape[1] :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_of_a_batch_equals_one_by_one_and_has_no_tags(options):
    model, rows = tagged(), [[LARGE], [SMALL]]
    texts = ids(f"aI{TAGS}bc", f"dI{TAGS}ef")
    options = options | {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        model.lang_encoder.lm_head.weight[TAG_IDS] *= 100  # the likeliest words, if they were allowed
    together = model.generate(input_ids=texts, **inputs_of(*rows), **options)
    assert not set(together[:, texts.shape[1] :].flatten().tolist()) & set(TAG_IDS)
    for text, row, expected in zip(texts, rows, together, strict=True):
        alone = model.generate(input_ids=text[None], **inputs_of(row), **options)[0]
        assert alone.tolist() == expected.tolist()


# Kept with the model, and refused


def test_an_adapter_keeps_its_tags(parts, tmp_path):
    @torch.no_grad()
    def logits(model, processor) -> torch.Tensor:
        return model(**processor(images=picture(64, 64), text="<image>a", return_tensors="pt")).logits

    save_adapter(*parts, tmp_path)
    loaded = load_adapter(tmp_path)
    assert tile_tag_ids(loaded[1].tokenizer) == tile_tag_ids(parts[1].tokenizer)
    assert torch.equal(logits(*loaded), logits(*parts))


WRONG = {
    "model.perceiver={depth: 2}": "set model.perceiver to null, or use learned",
    "trainable.new_tokens=false": "set trainable.new_tokens to true, or use learned",
}


@pytest.mark.parametrize("override", WRONG)
def test_tags_that_could_not_be_learned_are_refused(override):
    with pytest.raises(UserError, match=f"data.tiles.tags: .*{WRONG[override]}"):
        load_recipe("quickstart", ["data.tiles={tags: text}", "model.perceiver=null", override])


def test_new_tags_start_as_the_words_that_spell_them():
    model, _ = nano_flamingo({"depth": 0}, tagged_tiles=2)
    rows = model.token_rows.input.weight[
        [model.token_rows.token_ids.index(i) for i in model.config.tile_tag_ids]
    ]
    embeddings = model.lang_encoder.get_input_embeddings().weight
    plain = load_language("nano").tokenizer
    for tag, row in zip(tile_tags(2), rows, strict=True):
        pieces = plain(tag, add_special_tokens=False).input_ids
        torch.testing.assert_close(row, embeddings[pieces].mean(0))
    assert len(rows.unique(dim=0)) == len(rows)
