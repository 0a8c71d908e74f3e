"""Released models and checkpoints of their shapes need the backbones they were trained with.

Other backbones are refused before any weights are downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flamingo_ft.adapters import check_start
from flamingo_ft.adapters.released_models import RELEASED_MODELS, find_released
from flamingo_ft.backbones import language
from flamingo_ft.config import ModelSection
from flamingo_ft.errors import UserError
from flamingo_ft.plan.planner import Planner
from flamingo_ft.training import train as train_module
from flamingo_ft.training.train import train

from ..hub_folders import write_stand_in
from ..regimes import recipe

VISION = {"name": "ViT-L-14", "pretrained": "openai"}


def section(model, **changes) -> ModelSection:
    """Return the model section that a released model needs, with ``changes``."""
    needs = {
        "init_from": model.name,
        "vision": VISION,
        "language": {"name": model.languages[0]},
        "cross_attn_every_n_layers": model.interval,
        "media_visibility": model.visibility[0],
    }
    return ModelSection.model_validate({**needs, **changes})


def refusal(config: ModelSection) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_hub(monkeypatch):
    """Make every download of a language model fail."""
    monkeypatch.delattr(language, "snapshot_download", raising=False)


@pytest.mark.parametrize("model", RELEASED_MODELS, ids=lambda model: model.name)
def test_a_released_model_is_accepted_with_what_it_needs_and_refused_otherwise(model, no_hub):
    check_start(section(model))
    for name in model.languages:
        check_start(section(model, language={"name": name}))
    for other in RELEASED_MODELS:
        if other.languages != model.languages:
            message = refusal(section(model, language={"name": other.languages[0]}))
            assert message == (
                f"model.init_from: {model.name} needs {model.required_keys()}; "
                f"the recipe has model.language.name {other.languages[0]}"
            )
    assert model.languages[0] in model.required_keys()
    assert f"cross_attn_every_n_layers {model.interval} " in model.required_keys()


WRONG = {
    "nano": ({"language": {"name": "nano"}}, "model.language.name nano"),
    "another model on the Hub": ({"language": {"name": "org/other"}}, "model.language.name org/other"),
    "another tower": (
        {"vision": {**VISION, "name": "ViT-B-32"}},
        "model.vision {name: ViT-B-32, pretrained: openai}",
    ),
    "other weights": (
        {"vision": {**VISION, "pretrained": "laion2b"}},
        "vision {name: ViT-L-14, pretrained: laion2b}",
    ),
    "no weights": ({"vision": {"name": "ViT-L-14"}}, "model.vision {name: ViT-L-14, pretrained: null}"),
    "nano tower": ({"vision": {"name": "nano"}}, "model.vision {name: nano, pretrained: null}"),
    "interval": ({"cross_attn_every_n_layers": 1}, "cross_attn_every_n_layers 1"),
    "visibility": ({"media_visibility": "following"}, "media_visibility following"),
    "sizes": ({"perceiver": {"num_latents": 8}}, "other sizes in model.perceiver (leave it out)"),
}


@pytest.mark.parametrize(("changes", "expected"), WRONG.values(), ids=WRONG)
def test_a_key_that_does_not_fit_a_released_model_is_named_with_the_right_value(changes, expected, no_hub):
    model = RELEASED_MODELS[2]
    message = refusal(section(model, **changes))
    assert message.startswith(f"model.init_from: {model.name} needs {model.required_keys()}; the recipe has ")
    assert message.endswith(expected)


def test_all_wrong_keys_are_reported_at_once(no_hub):
    message = refusal(section(RELEASED_MODELS[0], cross_attn_every_n_layers=2, vision={"name": "nano"}))
    assert message.endswith(
        "the recipe has model.vision {name: nano, pretrained: null}, cross_attn_every_n_layers 2"
    )


@pytest.mark.parametrize("vision", [
    {"name": "ViT-L/14", "pretrained": "openai"},
    {"name": "ViT-L-14-quickgelu", "pretrained": "openai"},
    {"name": "hf-hub:timm/vit_large_patch14_clip_224.openai"},
])  # fmt: skip
def test_other_names_of_the_same_tower_are_the_same_tower(vision, no_hub):
    check_start(section(RELEASED_MODELS[0], vision=vision))


def test_a_copy_of_the_tower_is_recognized_by_architecture_or_shape(tmp_path, no_hub):
    (tmp_path / "weights.pt").write_bytes(b"")
    check_start(section(RELEASED_MODELS[0], vision={**VISION, "pretrained": str(tmp_path / "weights.pt")}))
    file = tmp_path / "open_clip_config.json"
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    shape = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
    file.write_text(json.dumps({"model_cfg": {"embed_dim": 768, "vision_cfg": shape}}))
    check_start(section(RELEASED_MODELS[0], vision={"name": str(tmp_path)}))
    file.write_text(json.dumps({"model_cfg": {"embed_dim": 768, "vision_cfg": {**shape, "patch_size": 16}}}))
    message = refusal(section(RELEASED_MODELS[0], vision={"name": str(tmp_path)}))
    assert message.endswith(f"the recipe has model.vision {{name: {tmp_path}, pretrained: null}}")


def test_a_revision_and_a_copy_in_the_cache_are_still_the_released_model(tmp_path):
    name = "openflamingo/OpenFlamingo-4B-vitl-rpj3b"
    cached = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40) / "checkpoint.pt"
    for start in (f"{name}@main", name.lower(), cached):
        assert find_released(start) is RELEASED_MODELS[2]
    assert find_released("org/other") is None and find_released(tmp_path / "checkpoint.pt") is None


def test_a_local_copy_of_the_language_model_is_recognized_by_its_shape(tmp_path):
    write_stand_in(tmp_path / "lm", "gpt_neox")
    model, folder = RELEASED_MODELS[2], {"name": str(tmp_path / "lm")}
    assert refusal(section(model, language=folder)).endswith(
        f"the recipe has model.language.name {tmp_path / 'lm'}"
    )
    config = (tmp_path / "lm" / "config.json").read_text()
    real = {'"hidden_size": 48': '"hidden_size": 2560', '"num_hidden_layers": 4': '"num_hidden_layers": 32'}
    for small, large in real.items():
        assert small in config
        config = config.replace(small, large)
    (tmp_path / "lm" / "config.json").write_text(config)
    check_start(section(model, language=folder))


def checkpoint(path: Path, model, **changes) -> Path:
    """Write a checkpoint with the tensor names and shapes of a released one."""
    sizes = {
        "width": model.width,
        "tower": 1024,
        "layers_path": model.layers_path,
        "blocks": model.blocks,
    } | changes
    matrix = torch.zeros(1).expand(512, sizes["width"])
    layers = f"lang_encoder.{sizes['layers_path']}"
    tensors = {f"{layers}.{k}.gated_cross_attn_layer.attn.to_q.weight": matrix for k in sizes["blocks"]}
    tensors["perceiver.latents"] = torch.zeros(1).expand(64, sizes["tower"])
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_of_other_shapes_is_refused_with_the_released_model_that_has_them(small_run, wrapped):
    path = checkpoint(small_run / "mine.pt", RELEASED_MODELS[2])
    if wrapped:
        tensors = {f"module.{name}": tensor for name, tensor in torch.load(path).items()}
        torch.save({"model_state_dict": tensors, "epoch": 3}, path)
    config = recipe("model.init_from=mine.pt")
    message = refusal(config.model)
    assert message == (
        f"model.init_from: {path} has cross-attention before gpt_neox.layers 1, 3, 5, ... of width 2560 on "
        "tower tokens of width 1024; the recipe makes cross-attention before model.layers 0, 1, 2, ... of "
        "width 128 on tower tokens of width 64; openflamingo/OpenFlamingo-4B-vitl-rpj3b (language model "
        "togethercomputer/RedPajama-INCITE-Base-3B-v1) or "
        "openflamingo/OpenFlamingo-4B-vitl-rpj3b-langinstruct (language model "
        "togethercomputer/RedPajama-INCITE-Instruct-3B-v1) has this geometry, with tower ViT-L-14 openai and "
        "cross_attn_every_n_layers 2"
    )
    with pytest.raises(UserError, match="has this geometry"):
        Planner(config, "cpu")


def test_the_error_for_a_file_names_the_released_model_of_its_shapes(small_run):
    for model in RELEASED_MODELS:
        path = checkpoint(small_run / "mine.pt", model)
        message = refusal(recipe(f"model.init_from={path}").model)
        assert f"{model.name} (language model {model.languages[0]})" in message
        others = {other.name for other in RELEASED_MODELS if other.layers_path != model.layers_path}
        assert not any(other in message for other in others)


def test_a_file_of_unknown_shapes_is_refused_without_naming_a_released_model(small_run):
    checkpoint(small_run / "mine.pt", RELEASED_MODELS[2], width=640)
    message = refusal(recipe("model.init_from=mine.pt").model)
    assert message.endswith("; name the language model, the tower and the interval that it was trained with")


@pytest.mark.parametrize("start", ["openflamingo/OpenFlamingo-3B-vitl-mpt1b", "mine.pt"])
def test_a_wrong_pairing_is_refused_before_anything_is_loaded_or_written(start, small_run, monkeypatch):
    checkpoint(small_run / "mine.pt", RELEASED_MODELS[0])
    monkeypatch.delattr(train_module, "build_model")
    with pytest.raises(UserError, match="^model.init_from: .*OpenFlamingo-3B-vitl-mpt1b"):
        train(recipe(f"model.init_from={start}"))
    assert not Path("run").exists()
