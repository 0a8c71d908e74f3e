"""open-flamingo 2.0.1 loads what is exported for it, and what it saves is imported, with equal logits.

    pip install --no-deps open-flamingo==2.0.1 einops einops-exts

Without it, `test_round_trips` compares with what was recorded from it (tests/golden).
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from flamingo_ft.adapters import add_lora, load_adapter, save_adapter, set_trainable
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import LoraPart, LoraSection, TrainableSection
from flamingo_ft.convert import export_open_flamingo, import_checkpoint
from flamingo_ft.model import build_flamingo
from tests.golden.recorded import TOLERANCE
from tests.regimes import shake

from .backbones import FAMILIES
from .test_round_trips import EVERY, logits

pytest.importorskip("open_flamingo")
pytestmark = pytest.mark.slow
LORA = LoraSection(**dict.fromkeys(("language", "cross_attention", "vision"), LoraPart(r=2)))


def peer(family):
    from tests.golden.record_open_flamingo import peer_flamingo

    return peer_flamingo(family, EVERY)[0]


@torch.no_grad()
def peer_logits(model, family):
    from tests.golden import cases

    batch = cases.interleaved(family)
    return model.double()(batch.vision_x.double(), batch.input_ids, batch.attention_mask).logits


def our_logits(folder, family):
    return logits(load_adapter(folder)[0].double(), family)


def distance(actual, expected):
    """Return the largest difference relative to the largest value, both computed in float64."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("lora", [None, LORA], ids=["bridge", "with LoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_an_adapter_written_for_it(family, lora, backbones, tmp_path):
    vision, language = load_vision(backbones[family].vision), load_language(backbones[family].language)
    model, processor = build_flamingo(vision, language, cross_attn_every_n_layers=EVERY)
    set_trainable(model, TrainableSection())
    shake(model, 0.3)
    if lora is not None:
        add_lora(model, lora)
        set_trainable(model, TrainableSection(cross_attention=True), lora)
        shake(model, 0.1, seed=1)
    save_adapter(model, processor, tmp_path / "adapter")
    export_open_flamingo(tmp_path / "adapter", tmp_path / "checkpoint.pt")
    other = peer(family)
    keys = other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=False)
    earlier_head = ["lang_encoder.embed_out.weight"] if family == "gpt_neox" else []  # for transformers 4
    assert keys.unexpected_keys == earlier_head
    assert not [key for key in keys.missing_keys if key.startswith("perceiver.") or "layers.gated" in key]
    assert distance(peer_logits(other, family), our_logits(tmp_path / "adapter", family)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_its_checkpoint_is_imported_with_equal_logits(family, backbones, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # imported there, not used
    from open_flamingo.train.train_utils import filter_state_dict_to_trainable

    other = peer(family)
    other.requires_grad_(False)
    for part in (
        other.perceiver,
        other.lang_encoder.gated_cross_attn_layers,
        other.lang_encoder.get_input_embeddings(),
    ):
        part.requires_grad_(True)
    with torch.no_grad():  # training moves the rows of its own two tokens, and of its bridge all
        other.lang_encoder.get_input_embeddings().weight[-2:] += 0.5
    state = filter_state_dict_to_trainable(other, other.state_dict())
    torch.save(
        {"epoch": 0, "model_state_dict": {f"module.{k}": v for k, v in state.items()}},
        tmp_path / "checkpoint_0.pt",
    )
    result = import_checkpoint(tmp_path / "checkpoint_0.pt", tmp_path / "adapter", backbones[family])
    assert result.result == "adapter"
    assert distance(our_logits(tmp_path / "adapter", family), peer_logits(other, family)) < TOLERANCE
