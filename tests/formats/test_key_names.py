"""transformers and OpenCLIP store the same CLIP tower under different names."""

import torch

from flamingo_ft.backbones.tower import build_visual
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.formats.key_names import UNUSED_PROJECTION, VISION_PREFIX, from_open_clip, to_open_clip
from tests.convert.backbones import VISION
from tests.convert.foreign import otter_tower
from tests.golden.tiny_models import IMAGE_SIZE


def stored() -> dict[str, torch.Tensor]:
    state = otter_tower().state_dict()
    return {
        f"vision_encoder.vision_model.{name.removeprefix('vision_model.')}": t for name, t in state.items()
    }


def test_otters_tower_gives_the_same_tokens_in_open_clip():
    skipped: dict[str, str] = {}
    tensors = to_open_clip(
        stored() | {"vision_encoder.vision_model.embeddings.position_ids": torch.arange(10)}, skipped
    )
    assert list(skipped) == ["vision_encoder.vision_model.embeddings.position_ids"]
    visual = build_visual({"embed_dim": 16, "vision_cfg": VISION}).eval()
    keys = visual.load_state_dict(
        {name.removeprefix(VISION_PREFIX): t for name, t in tensors.items()}, strict=False
    )
    assert keys.missing_keys == [UNUSED_PROJECTION] and not keys.unexpected_keys
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = otter_tower()(images).last_hidden_state[:, 1:]
    assert torch.allclose(spatial_tokens(visual, images), expected, atol=2e-6 * float(expected.abs().max()))


def test_renaming_to_open_clip_and_back_keeps_every_byte():
    back = from_open_clip(to_open_clip(stored(), {}))
    assert back.keys() == stored().keys() and all(
        torch.equal(back[name], tensor) for name, tensor in stored().items()
    )
