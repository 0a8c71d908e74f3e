"""The API for scripts written for OpenFlamingo."""

import inspect

import pytest
import torch
from PIL import Image

from flamingo_ft import Flamingo, create_model_and_transforms
from flamingo_ft.backbones.tower import build_visual

from .tiny import (
    EOC,
    MEDIA,
    PERCEIVER,
    VISION_CONFIG,
    VISION_WIDTH,
    ids,
    images,
    open_gates,
    tiny_language_model,
)


def flamingo(**options) -> Flamingo:
    torch.manual_seed(0)
    model = Flamingo(
        torch.nn.ModuleDict({"visual": build_visual(VISION_CONFIG)}),
        tiny_language_model(),
        EOC,
        MEDIA,
        VISION_WIDTH,
        **{"perceiver": PERCEIVER, **options},
    ).eval()
    open_gates(model)
    return model


def video(*shape, **options):
    """vision_x (B, M, F=1, C, H, W)."""
    return images(*shape, 1, **options)


def names(function) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def test_signatures_are_open_flamingos():
    assert names(Flamingo.__init__)[1:] == [
        "vision_encoder",
        "lang_encoder",
        "eoc_token_id",
        "media_token_id",
        "vis_dim",
        "cross_attn_every_n_layers",
        "gradient_checkpointing",
    ]
    assert names(Flamingo.forward)[1:] == [
        "vision_x",
        "lang_x",
        "attention_mask",
        "labels",
        "clear_conditioned_layers",
        "past_key_values",
        "use_cache",
    ]
    assert names(Flamingo.generate)[1:] == ["vision_x", "lang_x", "attention_mask", "kwargs"]
    assert names(Flamingo.cache_media)[1:] == ["input_ids", "vision_x"]
    assert names(create_model_and_transforms) == [
        "clip_vision_encoder_path",
        "clip_vision_encoder_pretrained",
        "lang_encoder_path",
        "tokenizer_path",
        "cross_attn_every_n_layers",
        "use_local_files",
        "decoder_layers_attr_name",
        "freeze_lm_embeddings",
        "flamingo_kwargs",
    ]


def test_modules_have_open_flamingos_names():
    model = flamingo(cross_attn_every_n_layers=2)
    assert [block is not None for block in model.gated_cross_attn_layers] == [False, True, False, True]
    assert model.lang_encoder is not None and model.perceiver is not None
    assert type(model.vision_encoder).__name__ == "VisionTransformer"


def test_media_of_a_forward_can_be_reused_by_the_next():
    model, text = flamingo(), ids("aIb")
    expected = model(video(1, 1), text).logits
    model(video(1, 1), text, clear_conditioned_layers=False)
    assert torch.equal(model(None, text).logits, expected)
    assert not torch.equal(model(video(1, 1, seed=3), text).logits, expected)
    with pytest.raises(ValueError, match="0 images"):
        model(None, text)


def test_new_images_are_refused_while_media_are_cached():
    model, text = flamingo(), ids("aIb")
    model.cache_media(text, video(1, 1))
    with pytest.raises(ValueError, match="uncache_media"):
        model(video(1, 1), text)
    model.uncache_media()
    model(video(1, 1), text)


@pytest.mark.parametrize("mode", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradients(mode):
    model, text = flamingo(), ids("aIbc")
    model.lang_encoder.requires_grad_(False)

    def gradients():
        model.train().zero_grad(set_to_none=True)
        model(video(1, 1), text, labels=text).loss.backward()
        return {
            name: p.grad for name, p in model.named_parameters() if name.startswith(("perceiver", "gated"))
        }

    expected = gradients()
    model.gradient_checkpointing_enable(mode)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0


def test_the_constructor_switches_gradient_checkpointing_on():
    model = flamingo(gradient_checkpointing=True)
    flags = [
        module.gradient_checkpointing
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    assert flags and all(flags)


def test_the_factory_returns_a_trainable_model_a_transform_and_a_tokenizer():
    model, transform, tokenizer = create_model_and_transforms(
        "nano", None, "nano", "nano", cross_attn_every_n_layers=2, perceiver=PERCEIVER
    )
    assert transform(Image.new("L", (50, 40))).shape == (3, 32, 32)
    hidden, white = Image.new("RGBA", (50, 40), (255, 0, 0, 0)), Image.new("RGB", (50, 40), "white")
    assert torch.equal(transform(hidden), transform(white))
    assert model.media_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert model.eoc_token_id == tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"perceiver", "gated_cross_attn_layers", "lang_encoder"}
    embedding = model.lang_encoder.get_input_embeddings().weight
    assert [p for p in model.lang_encoder.parameters() if p.requires_grad] == [embedding]
    tokenizer.padding_side = "left"
    text = tokenizer(["<image>An image of", "<image>Two<|endofchunk|>"], return_tensors="pt", padding=True)
    pixels = torch.stack([transform(Image.new("RGB", (32, 32)))] * 2)[:, None, None]
    out = model.generate(
        vision_x=pixels,
        lang_x=text["input_ids"],
        attention_mask=text["attention_mask"],
        max_new_tokens=5,
        num_beams=3,
    )
    assert torch.equal(out[:, : text["input_ids"].shape[1]], text["input_ids"])


def test_the_factory_can_freeze_the_embeddings():
    model, *_ = create_model_and_transforms(
        "nano", None, "nano", "nano", freeze_lm_embeddings=True, perceiver=PERCEIVER
    )
    assert not any(p.requires_grad for p in model.lang_encoder.parameters())
