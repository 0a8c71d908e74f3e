"""Each released tower, in small and by its own name: its tokens, two steps of training, and a merge."""

from __future__ import annotations

import math

import pytest
import torch

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.load import load_whole_model
from flamingo_ft.adapters.merge import write_merged
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from tests.regimes import build, trainer, write_run
from tests.thinned import slow_except

from .published_towers import TOWERS, PublishedTower, put_in_small

PLAIN = {"PE-Core-L-14-336"}


@pytest.fixture
def tower(request, hub, tmp_path, monkeypatch) -> PublishedTower:
    """A released tower in small on the local Hub, and a recipe in the current directory."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    put_in_small(request.param, monkeypatch, hub, tmp_path / "tower")
    return request.param


@pytest.mark.parametrize(
    "tower", slow_except([one for one in TOWERS if one.name in PLAIN], TOWERS), indirect=True, ids=str
)
def test_it_gives_its_tokens_trains_and_merges(tower, tmp_path):
    loaded = load_vision(tower.name, tower.pretrained)
    size = loaded.preprocess["size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    tokens = spatial_tokens(loaded.visual, torch.randn(1, 3, height, width))
    assert tokens.shape == (1, tower.tokens, tower.width) and loaded.width == tower.width

    name = f"model.vision={{name: {tower.name}, pretrained: {tower.pretrained or 'null'}}}"
    overrides = (name, "lora.vision={r: 2}", "train.max_steps=2", "train.warmup_steps=0")
    model, processor = build(*overrides)
    lora = {name for name, _ in model.named_parameters() if "vision_encoder" in name and "lora_" in name}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(model, processor, *overrides)
    run.train()
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)
    after = dict(model.named_parameters())
    assert lora and all(not after[name].equal(before[name]) for name in lora)

    save_adapter(model, processor, tmp_path / "adapter")
    write_merged(tmp_path / "adapter", tmp_path / "merged", processor, dtype=torch.float32)
    expected = picture_logits(model, processor, height, width)
    merged = picture_logits(load_whole_model(tmp_path / "merged"), processor, height, width)
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def picture_logits(model, processor, height: int, width: int) -> torch.Tensor:
    ids = processor.tokenizer(f"{processor.image_token} Which?", return_tensors="pt")["input_ids"]
    pixels = torch.randn(1, 1, 3, height, width, generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=ids, pixel_values=pixels).logits
