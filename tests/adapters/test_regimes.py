"""The training regimes, unquantized and quantized: what trains, what is saved, and what is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file

from flamingo_ft.adapters import load_adapter, load_base, save_adapter, trainable_parameters
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS

from ..regimes import REGIMES, build, logits, quantized, shake, trainer
from ..thinned import slow_except

FORMS = slow_except(["nf4"], ["none", "nf4", "int8"])


def settings(regime: str, form: str) -> tuple[str, ...]:
    return (*REGIMES[regime], *(quantized(form, regime) if form != "none" else ()))


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_step_changes_declared_parameters_and_no_bit_of_any_other(small_run, regime, form):
    model, processor = build(*settings(regime, form))
    declared = set(trainable_parameters(model))
    before = state(model)
    trainer(model, processor, *settings(regime, form), "train.max_steps=2").train()
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed <= declared
    untouched = {name for name in declared - changed if not name.endswith("lora_A.default.weight")}
    assert not untouched, "with B at zero, only A may stay the same in the first step"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_loaded_adapter_gives_the_same_logits_in_this_package_and_in_plain_peft(small_run, regime, form):
    model, processor = build(*settings(regime, form))
    shake(model)
    save_adapter(model, processor, Path("adapter"))
    expected = logits(model, processor)
    loaded, loaded_processor = load_adapter("adapter")
    assert torch.equal(logits(loaded, loaded_processor), expected)
    assert not trainable_parameters(loaded)
    base = load_base("adapter")
    parameters = sum(p.numel() for name, p in loaded.named_parameters())
    wrapped = PeftModel.from_pretrained(base, "adapter")
    assert torch.equal(logits(wrapped, processor), expected)
    in_peft = sum(p.numel() for name, p in wrapped.named_parameters() if "dummy" not in name)
    assert in_peft == parameters, "the bridge must exist once"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", ["bridge and LoRA", "LoRA everywhere"])
def test_saving_again_keeps_every_byte(small_run, regime, form):
    model, processor = build(*settings(regime, form), "trainable.dtype=bf16")
    shake(model)
    save_adapter(model, processor, Path("first"))
    save_adapter(*load_adapter("first"), Path("second"))
    names = sorted(path.name for path in Path("first").iterdir())
    assert names == sorted(path.name for path in Path("second").iterdir())
    for name in names:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes(), name


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_hash_seed(small_run):
    script = (
        "from pathlib import Path; from flamingo_ft.adapters import save_adapter;"
        "from flamingo_ft.config import load_recipe; import sys;"
        "from flamingo_ft.training.build import build_model;"
        "save_adapter(*build_model(load_recipe('./recipe.yaml', sys.argv[2:])), Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, seed, *settings("LoRA everywhere", "nf4")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
    for path in Path("1").iterdir():
        assert path.read_bytes() == Path("2", path.name).read_bytes(), path.name


def test_frozen_parts_of_a_loaded_bridge_are_not_in_the_adapter(small_run):
    model, processor = build(*settings("LoRA only", "nf4"))
    save_adapter(model, processor, Path("adapter"))
    assert all(".lora_" in name for name in load_file(Path("adapter", ADAPTER_WEIGHTS)))
    assert model.config.bridge_init["path"] == str(small_run / "start")


def test_frozen_parts_of_a_new_bridge_are_in_the_adapter(small_run):
    model, processor = build("trainable.perceiver=false")
    shake(model)
    save_adapter(model, processor, Path("adapter"))
    assert any("perceiver.latents" in name for name in load_file(Path("adapter", ADAPTER_WEIGHTS)))
    expected = logits(model, processor)
    assert torch.equal(logits(*load_adapter("adapter")), expected)


def test_saving_refuses_trainable_lora_that_would_be_missing_from_the_adapter(small_run):
    model, processor = build(*REGIMES["bridge and LoRA"])
    inject_adapter_in_model(LoraConfig(target_modules=["layers.0.self_attn.q_proj"]), model, "other")
    model.get_submodule("lang_encoder.model.layers.0.self_attn.q_proj").lora_A["other"].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"lora_A\.other\.weight; nothing written"):
        save_adapter(model, processor, Path("adapter"))
    assert not Path("adapter").exists()


@pytest.mark.parametrize("form", slow_except(["nf4"], ["nf4", "int8"]))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_trainer_keeps_the_declared_dtypes_and_float32_gates(small_run, form, dtype):
    expected_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    overrides = (*settings("bridge and LoRA", form), f"trainable.dtype={dtype}")
    model, processor = build(*overrides)
    starts = {name: parameter.clone() for name, parameter in trainable_parameters(model).items()}
    made = trainer(model, processor, *overrides)
    for name, parameter in trainable_parameters(made.model).items():
        assert parameter.dtype == (torch.float32 if name.endswith("_gate") else expected_dtype), name
        assert torch.equal(parameter, starts[name]), name
    made.train()
    assert all(
        p.dtype == (torch.float32 if n.endswith("_gate") else expected_dtype)
        for n, p in trainable_parameters(model).items()
    )
