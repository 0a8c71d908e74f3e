"""Vision towers: spatial tokens in every mode, rebuilding from the configuration, and loading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.pretrained import _PRETRAINED
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from flamingo_ft.backbones import tower_source
from flamingo_ft.backbones.provenance import tensors_sha256
from flamingo_ft.backbones.tower import (
    MAX_ASPECT,
    build_visual,
    image_transform,
    non_persistent_buffers,
    to_picture,
)
from flamingo_ft.backbones.vision import VisionBackbone, load_vision
from flamingo_ft.backbones.visual_tokens import spatial_maps, spatial_tokens, token_width
from flamingo_ft.errors import UserError

CLIP_CFG = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
COCA_CFG = {**CLIP_CFG, "attentional_pool": True, "attn_pooler_heads": 2}
RESNET_CFG = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
TEXT_CFG = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}


def timm_config(trunk: str, size: int, **more) -> dict:
    cfg = {"timm_model_name": trunk, "timm_pool": "avg", "timm_proj": "linear", "image_size": size, **more}
    return {"embed_dim": 16, "vision_cfg": cfg}


# name: (config, V, D). Some have stochastic layers, which run in train mode only.
TOWERS = {
    "clip": ({"embed_dim": 16, "vision_cfg": {**CLIP_CFG, "patch_dropout": 0.5}}, 16, 32),
    "clip-quickgelu": ({"embed_dim": 16, "vision_cfg": CLIP_CFG, "quick_gelu": True}, 16, 32),
    "coca": ({"embed_dim": 16, "vision_cfg": COCA_CFG}, 16, 32),
    "resnet": ({"embed_dim": 16, "vision_cfg": RESNET_CFG}, 4, 256),
    "vit": (timm_config("test_vit", 160, timm_drop_path=0.5), 100, 64),
    "vit-registers": (timm_config("vit_wee_patch16_reg1_gap_256", 256, timm_drop_path=0.5), 256, 256),
    "vit-relative": (timm_config("test_vit_relpos", 160), 100, 96),
    "eva-rotary": (timm_config("eva02_tiny_patch14_224", 224, timm_pool="token"), 256, 192),
    "convnext": (timm_config("test_convnext", 160, timm_drop_path=0.5), 25, 64),
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request) -> tuple[dict, nn.Module, torch.Tensor, int, int]:
    """Return a random tower: its configuration, the module, two images, and the expected V and D."""
    config, tokens, width = TOWERS[request.param]
    torch.manual_seed(0)
    visual = build_visual(config).eval()
    size = config["vision_cfg"]["image_size"]
    return config, visual, torch.randn(2, 3, size, size), tokens, width


def checkpoint(config: dict) -> tuple[nn.Module, dict]:
    """Return a whole random CLIP model with this tower, and its state dict as in OpenCLIP checkpoints."""
    torch.manual_seed(1)
    quick_gelu = config.get("quick_gelu", False)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], TEXT_CFG, quick_gelu=quick_gelu).eval()
    return model, model.state_dict()


def write_folder(folder: Path, config: dict, **preprocess) -> nn.Module:
    model, weights = checkpoint(config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    contents = {"model_cfg": {**config, "text_cfg": TEXT_CFG}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(contents))
    return model.visual


# Spatial tokens


def test_every_tower_gives_one_token_of_its_width_per_patch(tower):
    _, visual, images, tokens, width = tower
    assert spatial_tokens(visual, images).shape == (2, tokens, width)
    assert token_width(visual) == width


@pytest.mark.parametrize("name", ["clip", "clip-quickgelu"])
def test_clip_tokens_are_those_before_open_clips_final_norm(name):
    visual = build_visual(TOWERS[name][0]).eval()
    images = torch.randn(2, 3, 32, 32)
    ours = spatial_tokens(visual, images)
    visual.output_tokens = visual.final_ln_after_pool = True
    with torch.no_grad():
        assert torch.equal(ours, visual(images)[1])


PREFIX_TOKENS = {"vit": 1, "vit-registers": 1, "vit-relative": 0, "eva-rotary": 1}


@pytest.mark.parametrize("name, prefix", PREFIX_TOKENS.items())
def test_timm_tokens_are_the_last_blocks_without_class_and_register_tokens(name, prefix):
    config, tokens, _ = TOWERS[name]
    visual = build_visual(config).eval()
    images = torch.randn(1, 3, *visual.image_size)
    outputs = []
    visual.trunk.blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    ours = spatial_tokens(visual, images)
    assert outputs[0].shape[1] == tokens + prefix
    assert torch.equal(ours, outputs[0][:, prefix:])


@pytest.mark.parametrize("name, last", [("resnet", "layer4"), ("convnext", "trunk.stages.3")])
def test_feature_maps_become_tokens_row_by_row(name, last):
    config = TOWERS[name][0]
    visual = build_visual(config).eval()
    size = config["vision_cfg"]["image_size"]
    outputs = []
    visual.get_submodule(last).register_forward_hook(lambda module, args, output: outputs.append(output))
    tokens = spatial_tokens(visual, torch.randn(1, 3, size, 2 * size))
    side = outputs[0].shape[-1]
    assert side == 2 * outputs[0].shape[-2]
    assert torch.equal(tokens[0, side + 1], outputs[0][0, :, 1, 1])


def test_the_grid_of_a_tower_is_its_tokens_row_by_row(tower):
    _, visual, images, _, _ = tower
    maps = spatial_maps(visual, images)
    assert torch.equal(spatial_tokens(visual, images), torch.stack([*maps.flatten(2)]).mT)
    assert maps.shape[2] * images.shape[3] == maps.shape[3] * images.shape[2]  # as wide as the images


def test_a_tower_without_spatial_tokens_is_refused():
    with pytest.raises(UserError, match="Linear has no spatial tokens"):
        spatial_tokens(nn.Linear(3, 3), torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="unknown token width of a Linear"):
        token_width(nn.Linear(3, 3))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_picture_is_what_the_tower_sees_in_8_bits(mode):
    image = Image.effect_noise((48, 32), 80).convert("RGB")
    preprocess = {"size": 32, "mean": [0.2, 0.5, 0.6], "std": [0.3, 0.2, 0.4], "resize_mode": mode}
    neutral = preprocess | {"mean": [0, 0, 0], "std": [1, 1, 1]}
    pixels = torch.stack([image_transform(preprocess)(image)] * 2)
    seen = (255 * image_transform(neutral)(image)).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(to_picture(preprocess, pixels), torch.stack([seen, seen]))


@pytest.mark.parametrize("size", [(8, 600), (601, 8), (8, 513), (8, 512), (20, 1300)], ids=str)
def test_a_thin_image_is_seen_as_open_clip_sees_it(size):
    preprocess = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
    reference = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    image = Image.effect_noise(size, 80).convert("RGB")
    seen, expected = (
        to_picture(preprocess, made(image)) for made in (image_transform(preprocess), reference)
    )
    assert (seen.int() - expected.int()).abs().max() <= 1


def test_a_thin_image_takes_no_more_memory_than_another(monkeypatch):
    largest = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *rest, **named: largest.append(size) or resize(image, size)
    )
    preprocess = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
    assert image_transform(preprocess)(Image.new("RGB", (1, 60_000))).shape == (3, 32, 32)
    assert largest == [(32, 32 * MAX_ASPECT)]


# Gradients and mode


def test_tokens_have_no_gradient(tower):
    _, visual, images, _, _ = tower
    assert not spatial_tokens(visual, images.clone().requires_grad_()).requires_grad
    assert torch.is_grad_enabled()


def test_train_mode_changes_neither_tokens_nor_statistics_and_is_restored(tower):
    _, visual, images, _, _ = tower
    expected, before = spatial_tokens(visual, images), tensors_sha256(visual)
    visual.train()
    list(visual.children())[-1].eval()
    modes = [module.training for module in visual.modules()]
    assert torch.equal(spatial_tokens(visual, images), expected)
    assert [module.training for module in visual.modules()] == modes
    assert tensors_sha256(visual) == before
    visual.eval()


def test_train_mode_is_restored_after_an_error():
    visual = build_visual(TOWERS["clip"][0]).train()
    with pytest.raises(RuntimeError):
        spatial_tokens(visual, torch.randn(1, 3, 40, 40))
    assert all(module.training for module in visual.modules()) and torch.is_grad_enabled()


def test_images_take_the_dtype_of_the_tower():
    visual = build_visual(TOWERS["clip"][0]).to(torch.bfloat16)
    assert spatial_tokens(visual, torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16


# Rebuilding


def test_a_tower_rebuilt_from_its_configuration_gives_the_same_tokens(tower):
    config, visual, images, _, _ = tower
    rebuilt = build_visual(json.loads(json.dumps(config)))
    rebuilt.load_state_dict(visual.state_dict(), strict=True)
    assert torch.equal(spatial_tokens(rebuilt, images), spatial_tokens(visual, images))


def test_state_dict_and_non_persistent_buffers_complete_a_tower_built_on_meta(tower):
    config, visual, images, _, _ = tower
    with torch.device("meta"):
        rebuilt = build_visual(config)
        buffers = non_persistent_buffers(config)
    assert all(parameter.is_meta for parameter in rebuilt.parameters())
    rebuilt.load_state_dict(visual.state_dict(), strict=True, assign=True)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(rebuilt.get_submodule(owner), leaf, buffer)
    assert torch.equal(spatial_tokens(rebuilt, images), spatial_tokens(visual, images))


def test_only_towers_with_computed_positions_have_non_persistent_buffers():
    names = {name for name, (config, _, _) in TOWERS.items() if non_persistent_buffers(config)}
    assert names == {"vit-relative", "eva-rotary"}


# Loading


@pytest.fixture
def tiny_architecture(monkeypatch, tmp_path) -> VisionBackbone:
    """Register with OpenCLIP an architecture "tiny" with a tag "openai" that was trained with QuickGELU.

    The tag's weights are in a folder like the Hub's cache. Return the tower that was saved there.
    """
    config = {"embed_dim": 16, "vision_cfg": CLIP_CFG, "text_cfg": TEXT_CFG}
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny", config)
    tag = {"hf_hub": "org/tiny/", "quick_gelu": True, "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    monkeypatch.setitem(_PRETRAINED, "tiny", {"openai": tag})
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0a1b2c"
    visual = write_folder(snapshot, TOWERS["clip-quickgelu"][0], resize_mode="longest")

    def download(repository: str, filename: str | None, revision: str | None) -> str:
        assert repository == "org/tiny" and revision in (None, "0a1b2c")
        return str(snapshot / (filename or "open_clip_model.safetensors"))

    monkeypatch.setattr(tower_source, "download_pretrained_from_hf", download)
    return visual


@pytest.mark.parametrize("name", ["clip-quickgelu", "resnet", "vit"])
def test_a_local_folder_loads_frozen_and_as_open_clip_loads_it(name, tmp_path):
    config = {"quick_gelu": False, **TOWERS[name][0]}
    saved = write_folder(tmp_path, config, mean=[0.5, 0.4, 0.3], resize_mode="squash")
    loaded = load_vision(str(tmp_path))
    assert loaded.config == config
    assert loaded.width == token_width(saved)
    assert loaded.source == {
        "name": str(tmp_path),
        "pretrained": None,
        "revision": None,
        "sha256": tensors_sha256(saved),
        "quantization": None,
        "image_size": None,
    }
    assert not loaded.visual.training and not any(p.requires_grad for p in loaded.visual.parameters())
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    reference, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert torch.equal(image_transform(loaded.preprocess)(image), transform(image))
    assert json.loads(json.dumps(reference.visual.preprocess_cfg)) == loaded.preprocess


def test_config_preprocess_and_source_are_json(tiny_architecture):
    loaded = load_vision("tiny", "openai")
    for record in (loaded.config, loaded.preprocess, loaded.source):
        assert json.loads(json.dumps(record)) == record


def test_rebuilding_never_downloads_the_weights_a_trunk_was_pretrained_with(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)
    build_visual(timm_config("test_vit", 160, timm_model_pretrained=True))


def test_a_tag_sets_activation_preprocessing_and_commit(tiny_architecture):
    loaded = load_vision("tiny", "openai")
    images = torch.randn(2, 3, 32, 32)
    assert loaded.config["quick_gelu"]
    assert any(isinstance(module, QuickGELU) for module in loaded.visual.modules())
    assert torch.equal(spatial_tokens(loaded.visual, images), spatial_tokens(tiny_architecture, images))
    assert loaded.preprocess["std"] == [0.5] * 3 and loaded.preprocess["size"] == [32, 32]
    assert loaded.source["revision"] == "0a1b2c"


def test_a_hub_repository_loads_at_the_revision_it_records(tiny_architecture):
    first = load_vision("hf-hub:org/tiny")
    again = load_vision("hf-hub:org/tiny", revision=first.source["revision"])
    assert first.source == again.source
    assert first.source["revision"] == "0a1b2c" and first.preprocess["resize_mode"] == "longest"
    assert first.source["sha256"] == tensors_sha256(tiny_architecture)


def test_a_file_with_weights_loads_into_the_architecture_as_named(tiny_architecture, tmp_path):
    model, weights = checkpoint(TOWERS["clip"][0] | {"vision_cfg": CLIP_CFG})
    torch.save({"state_dict": weights}, tmp_path / "mine.pt")
    loaded = load_vision("tiny", str(tmp_path / "mine.pt"))
    assert loaded.source["sha256"] == tensors_sha256(model.visual)
    assert not loaded.config["quick_gelu"] and loaded.source["revision"] is None


def test_without_weights_the_tower_is_random_and_nothing_is_downloaded(tiny_architecture, monkeypatch):
    monkeypatch.setattr(tower_source, "download_pretrained_from_hf", None)
    torch.manual_seed(3)
    first = load_vision("tiny")
    torch.manual_seed(3)
    same, other = load_vision("tiny"), load_vision("tiny")
    assert first.source["sha256"] == same.source["sha256"] != other.source["sha256"]


@pytest.mark.skipif(not tower_source.NANO_FOLDER.is_dir(), reason="the nano tower has not been built")
def test_the_nano_tower_is_a_local_folder_like_any_other():
    nano, folder = load_vision("nano"), load_vision(str(tower_source.NANO_FOLDER))
    assert nano.source["name"] == "nano" and nano.source["sha256"] == folder.source["sha256"]
    images = torch.randn(2, 3, *nano.visual.image_size)
    assert spatial_tokens(nano.visual, images).shape[::2] == (2, nano.width)


# User errors


@pytest.mark.parametrize(
    "arguments, message_part",
    [
        (("ViT-B-33",), "nearest known: ViT-B-32"),
        (("tiny", "opeani"), "tags of tiny: openai"),
        (("nano", "openai"), "needs an OpenCLIP architecture, got nano; remove pretrained"),
        (("./no/such/folder",), "vision tower: no folder ./no/such/folder; check the path"),
        (("tiny", None, "main"), "remove the revision"),
        (("{tmp}/empyt",), "/empyt; did you mean {tmp}/empty?"),
        (("tiny", "{tmp}/txet.pt"), "weights of tiny: no file {tmp}/txet.pt; did you mean {tmp}/text.pt?"),
        (("{tmp}/empty",), "has no open_clip_config.json"),
        (("{tmp}/broken",), "broken/open_clip_config.json is not an OpenCLIP configuration"),
        (("{tmp}/weightless",), "holds no weights"),
        (("{tmp}/misfit",), "cannot load"),
        (("tiny", "{tmp}/text.pt"), "text.pt holds more than plain weights"),
        (("tiny", "{tmp}/misfit/open_clip_model.safetensors"), "cannot load"),
    ],
)
def test_user_errors_are_one_line(arguments, message_part, tiny_architecture, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("not weights")
    for name in ("broken", "weightless", "misfit"):
        write_folder(tmp_path / name, TOWERS["clip"][0])
    (tmp_path / "broken" / "open_clip_config.json").write_text("{")
    (tmp_path / "weightless" / "open_clip_model.safetensors").unlink()
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "misfit" / "open_clip_model.safetensors")
    with pytest.raises(UserError) as caught:
        load_vision(*(a and a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert message_part.replace("{tmp}", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("arguments", [("hf-hub:org/absent",), ("ViT-B-32", "openai")])
def test_without_a_network_the_error_names_what_is_missing(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"(open_clip_config.json|weights|open_clip_.*) of vision tower .*: HF_HUB_OFFLINE is set, "
        "and the cache is incomplete",
    ) as caught:
        load_vision(*arguments)
    assert "\n" not in str(caught.value)


SIZES = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size")


def kinds_of_towers() -> list[str]:
    """The first of OpenCLIP's architectures of each kind: those of a kind differ in their sizes."""
    first: dict[str, str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {"quick_gelu": config.get("quick_gelu", False), **config["vision_cfg"]}
        is_resnet = isinstance(vision.get("layers"), list)
        timm_kind = re.sub(r"\d+|tiny|small|medium|base|large|giant", "", vision.pop("timm_model_name", ""))
        options = sorted((key, str(value)) for key, value in vision.items() if key not in SIZES)
        first.setdefault(str((is_resnet, timm_kind, options)), name)
    return [*first.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", kinds_of_towers())
def test_every_kind_of_open_clips_architectures_has_spatial_tokens(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        visual = build_visual(config)
        size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
        tokens = spatial_tokens(visual, torch.empty(2, 3, *size))
    assert tokens.shape[::2] == (2, token_width(visual))
    assert tokens.shape[1] >= 16
