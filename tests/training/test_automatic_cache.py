"""A run keeps the tower's tokens where that pays, says so, and learns the same as with a cache of its own."""

import pytest
import torch

from flamingo_ft.backbones import precision
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.data import open_data
from flamingo_ft.training import automatic_cache as module
from flamingo_ft.training.automatic_cache import automatic_cache
from flamingo_ft.training.train import train

from ..regimes import AUTO, build, recipe

# The data have two rows with an image each: two epochs of one batch.
TWO_EPOCHS = (*AUTO, "train.max_steps=2", "train.batch_size=2")


@pytest.fixture(autouse=True)
def in_bf16(small_run, monkeypatch):
    """On a processor with bf16, with a tower that is large enough, and images as many as the tower takes."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(module, "MIN_PARAMETERS", 1)
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_run / "home"))


def chosen(*overrides: str):
    config = recipe(*TWO_EPOCHS, *overrides)
    model, _ = build(*TWO_EPOCHS, *overrides)
    return automatic_cache(model, open_data(config.data, config.train.seed), config)


def test_two_epochs_are_cached_in_the_users_folder(small_run):
    cache = chosen()
    assert cache.epochs == 2 and cache.section.folder == small_run / "home" / "flamingo_ft" / "tokens"
    assert 0 < cache.section.max_gib <= module.MAX_GIB
    tokens = spatial_tokens(load_vision("nano").visual, torch.zeros(1, 3, 32, 32))
    bytes_of_a_number = 2
    assert cache.size == 2 * tokens.numel() * bytes_of_a_number


@pytest.mark.parametrize(
    "override",
    [
        "data.auto_cache=false",
        "data.cache={folder: tokens}",
        "data.augmentation={}",
        "train.max_steps=1",
        "train.precision=fp32",
        "model.vision.quantization=int8",
        "lora.vision={r: 2, target_modules: [in_proj]}",
    ],
)
def test_it_is_not_cached_where_it_would_not_pay_or_would_change_the_run(override):
    assert chosen(override) is None


@pytest.mark.parametrize(("name", "value"), [("MIN_PARAMETERS", 10**9), ("BATCH_SIZE", 3), ("MAX_GIB", 1e-9)])
def test_small_towers_small_batches_and_large_data_are_not_cached(monkeypatch, name, value):
    monkeypatch.setattr(module, name, value)
    assert chosen() is None


def test_the_run_says_so_and_equals_one_with_its_own_cache(small_run):
    lines: list[str] = []
    train(recipe(*TWO_EPOCHS, "train.output_dir=automatic"), log=lines.append)
    (line,) = [line for line in lines if line.startswith("data.auto_cache: ")]
    assert str(small_run / "home") in line and "2 epochs" in line and "data.auto_cache=false" in line
    assert len([*(small_run / "home").rglob("*.safetensors")]) == 2
    train(recipe(*TWO_EPOCHS, "train.output_dir=own", "data.cache={folder: tokens}"))
    adapters = [(small_run / run / "adapter_model.safetensors").read_bytes() for run in ("automatic", "own")]
    assert adapters[0] == adapters[1]
    resolved = (small_run / "automatic" / "resolved_recipe.yaml").read_text()
    assert str(small_run / "home") not in resolved
