"""An adapter's files: complete, exact, in PEFT's format, and bound to their backbones."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from flamingo_ft.adapters import load_adapter, save_adapter, set_trainable, trainable_parameters
from flamingo_ft.config import TrainableSection
from flamingo_ft.errors import UserError
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS


def inputs(processor):
    text = f"{processor.image_token} Which digit? {processor.image_token} And this? <|endofchunk|>"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    }


@torch.no_grad()
def logits(model, processor):
    return model(**inputs(processor)).logits


@pytest.fixture
def saved(make_model, tmp_path):
    model, processor = make_model()
    save_adapter(model, processor, tmp_path / "adapter")
    return tmp_path / "adapter", logits(model, processor)


def test_a_loaded_adapter_gives_the_same_logits(saved):
    folder, expected = saved
    model, processor = load_adapter(folder)
    assert torch.equal(logits(model, processor), expected)
    assert not trainable_parameters(model)


def test_saving_again_keeps_every_byte(saved, tmp_path):
    folder, _ = saved
    save_adapter(*load_adapter(folder), tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_peft_loads_an_adapter_into_its_base_in_place(saved, make_model):
    folder, expected = saved
    base, processor = make_model(seed=7)
    assert not torch.equal(logits(base, processor), expected)
    parameters = sum(p.numel() for p in base.parameters())
    wrapped = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(wrapped, processor), expected)
    assert sum(p.numel() for p in wrapped.parameters()) == parameters


@pytest.mark.parametrize("part", ["perceiver", "cross_attention", "new_tokens"])
def test_only_the_declared_parts_are_trainable(make_model, part):
    parts = dict.fromkeys(("perceiver", "cross_attention", "new_tokens"), False) | {part: True}
    model, _ = make_model(**parts)
    prefix = {
        "perceiver": "perceiver.",
        "cross_attention": "gated_cross_attn_layers.",
        "new_tokens": "token_rows.",
    }
    names = trainable_parameters(model)
    assert names and all(name.startswith(prefix[part]) for name in names)


def test_every_trainable_tensor_is_in_the_file(make_model, tmp_path):
    model, processor = make_model()
    save_adapter(model, processor, tmp_path)
    stored = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / ADAPTER_WEIGHTS)}
    assert set(trainable_parameters(model)) <= stored


def test_a_trainable_parameter_missing_from_the_adapter_is_refused_and_nothing_written(make_model, tmp_path):
    model, processor = make_model()
    model.lang_encoder.model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"lang_encoder\.model\.norm\.weight"):
        save_adapter(model, processor, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_gates_stay_in_float32_where_the_bridge_trains_in_bf16(make_model):
    model, _ = make_model()
    set_trainable(model, TrainableSection(dtype="bf16"))
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == (torch.float32 if name.endswith("_gate") else torch.bfloat16), name


def test_a_bf16_bridge_runs_and_learns_inside_a_float32_language_model(make_model):
    model, processor = make_model()
    set_trainable(model, TrainableSection(dtype="bf16"))
    batch = inputs(processor)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model).values())


def test_an_adapter_records_its_backbones_and_format_version(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1
    for part in ("vision", "language"):
        assert config["backbones"][part]["name"] == "nano"
        assert len(config["backbones"][part]["sha256"]) == 64
        assert "revision" in config["backbones"][part]
    assert config["bridge_init"] is None


def damage(folder, kind):
    weights = folder / ADAPTER_WEIGHTS
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    if kind == "another base":
        config["backbones"]["language"]["sha256"] = "0" * 64
    elif kind == "newer format":
        config["format_version"] = 99
    elif kind == "lost weight":
        save_file({k: v for k, v in tensors.items() if k != first}, weights)
    elif kind == "wrong shape":
        save_file({**tensors, first: tensors[first].flatten()[:1].clone()}, weights)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no weights":
        weights.unlink()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another base", "base mismatch: the adapter was trained on language backbone nano with SHA-256"),
        ("newer format", "format version 99 is newer"),
        ("lost weight", "lacks 1 of its weights"),
        ("wrong shape", ", got (1,); the adapter is damaged"),
        ("truncated", "not a readable safetensors file"),
        ("no weights", "not an adapter, adapter_model.safetensors not found"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_line(saved, kind, message):
    folder, _ = saved
    damage(folder, kind)
    with pytest.raises(UserError) as error:
        load_adapter(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)
