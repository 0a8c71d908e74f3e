"""A whole model on disk, and copies in memory."""

import copy
import json

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from flamingo_ft.backbones.tower import non_persistent_buffers

from .tiny import ids, images, tiny_flamingo, tiny_language_model
from .tiny_language_models import make_tiny

INPUTS = ids("aIbIc"), images(1, 2)


def test_a_saved_model_reloads_with_equal_logits(tmp_path):
    model = tiny_flamingo(cross_attn_every_n_layers=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(*INPUTS).logits, model(*INPUTS).logits)


def test_saving_a_loaded_model_keeps_every_byte(tmp_path):
    tiny_flamingo().save_pretrained(tmp_path / "made")
    for source, target in (("made", "first"), ("first", "second")):
        AutoModelForImageTextToText.from_pretrained(tmp_path / source).save_pretrained(tmp_path / target)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    weights = "model.safetensors"
    assert (tmp_path / "made" / weights).read_bytes() == (tmp_path / "first" / weights).read_bytes()


def test_tied_embeddings_stay_tied_and_are_saved_once(tmp_path):
    model = tiny_flamingo(lm=tiny_language_model(tie_word_embeddings=True))
    assert model.token_rows.output is None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lang_encoder.lm_head.weight is loaded.lang_encoder.model.embed_tokens.weight
    assert torch.equal(loaded(*INPUTS).logits, model(*INPUTS).logits)


def test_the_configuration_reloads_unchanged(tmp_path):
    model = tiny_flamingo(media_visibility="all_preceding", cross_attn_every_n_layers=2)
    model.save_pretrained(tmp_path)
    loaded, written = AutoConfig.from_pretrained(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert {**loaded.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert written["model_type"] == "flamingo" and written["format_version"] == 1


def test_building_a_flamingo_leaves_the_language_model_as_it_was():
    lm = tiny_language_model()
    keys, attention = list(lm.state_dict()), lm.config._attn_implementation
    weights = copy.deepcopy(lm.state_dict())
    plain = lm(ids("abc")).logits
    model = tiny_flamingo(lm=lm)
    model(*INPUTS)
    assert list(lm.state_dict()) == keys and lm.config._attn_implementation == attention
    assert all(torch.equal(value, weights[name]) for name, value in lm.state_dict().items())
    assert torch.equal(lm(ids("abc")).logits, plain)


def test_a_deep_copy_is_independent():
    model = tiny_flamingo()
    expected = model(*INPUTS).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.perceiver.latents.add_(1.0)
        twin.token_rows.input.weight.add_(1.0)
    assert torch.equal(model(*INPUTS).logits, expected)
    assert not torch.equal(twin(*INPUTS).logits, expected)


def test_two_flamingos_share_one_language_model_without_interference():
    lm = tiny_language_model()
    first = tiny_flamingo(lm=lm)
    expected = first(*INPUTS).logits
    second = tiny_flamingo(seed=5, lm=lm)
    assert not torch.equal(second(*INPUTS).logits, expected)
    assert torch.equal(first(*INPUTS).logits, expected)


def test_rows_of_new_tokens_replace_the_language_models_own():
    model = tiny_flamingo()
    by_rows = model(*INPUTS).logits
    with torch.no_grad():
        for matrix, rows in (
            (model.get_input_embeddings(), model.token_rows.input),
            (model.lang_encoder.lm_head, model.token_rows.output),
        ):
            matrix.weight[list(model.token_rows.token_ids)] = rows.weight
    torch.testing.assert_close(model(*INPUTS).logits, by_rows)
    model.token_rows._conditioning = type("Closed", (), {"is_open": False})()
    torch.testing.assert_close(model(*INPUTS).logits, by_rows)


def test_get_output_embeddings_has_the_rows_in_place():
    model = tiny_flamingo()
    head = model.get_output_embeddings()
    hidden = model.backbone(*INPUTS).last_hidden_state
    torch.testing.assert_close(hidden @ head.weight.T, model(*INPUTS).logits)


def test_non_persistent_buffers_are_restored(tmp_path):
    """State dicts lack the rotary tables of an EVA tower and a language model's computed buffers."""
    vision = {
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_pool": "",
        "timm_proj": "",
        "image_size": 224,
    }
    config = {"embed_dim": 16, "vision_cfg": vision}
    model = tiny_flamingo(lm=make_tiny("falcon_h1"), vision_config=config, vision_width=192)
    assert non_persistent_buffers(config)
    inputs = ids("aIb"), torch.randn(1, 1, 3, 224, 224)
    expected = model(*inputs, use_cache=False).logits
    model.save_pretrained(tmp_path)
    for options in ({}, {"device_map": "cpu"}):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **options)
        assert torch.equal(loaded(*inputs, use_cache=False).logits, expected)
