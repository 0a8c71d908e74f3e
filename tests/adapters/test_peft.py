"""A second adapter through PEFT's and transformers' own methods: what is switched and what is not."""

import importlib.metadata
import shutil

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION

from flamingo_ft.adapters import Adapters, load_adapter, load_base, save_adapter
from flamingo_ft.adapters.init_from import bridge_tensors
from flamingo_ft.adapters.load import set_bridge_parameters
from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import is_lora

from .. import regimes

KINDS = {"bridge and LoRA": regimes.REGIMES["bridge and LoRA"], "LoRA": regimes.REGIMES["LoRA everywhere"]}


@pytest.fixture(scope="module")
def pairs(trained_start, tmp_path_factory):
    """Two adapters of each kind."""
    folder = tmp_path_factory.mktemp("pairs")
    shutil.copytree(trained_start, folder, dirs_exist_ok=True)
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, overrides in KINDS.items():
            for seed in (1, 2):
                model, processor = regimes.build(*overrides)
                regimes.shake(model, 0.3, seed)
                save_adapter(model, processor, folder / f"{kind} {seed}")
            folders[kind] = [folder / f"{kind} {seed}" for seed in (1, 2)]
    return folders


@pytest.fixture(params=["bridge and LoRA", pytest.param("LoRA", marks=pytest.mark.slow)])
def pair(request, pairs):
    """Both folders of a kind, both adapters' logits, and those of the first LoRA with the second bridge."""
    first, second = pairs[request.param]
    (model, processor), (other, _) = load_adapter(first), load_adapter(second)
    expected = [regimes.logits(model, processor), regimes.logits(other, processor)]
    set_bridge_parameters(
        model, {name: tensor for name, tensor in bridge_tensors(other).items() if not is_lora(name)}
    )
    mixed = regimes.logits(model, processor)
    assert torch.equal(mixed, expected[0]) == (request.param == "LoRA") and not torch.equal(*expected)
    return first, second, *expected, mixed, processor


def test_peft_switches_lora_and_leaves_the_bridge_that_was_loaded_last(pair):
    first, second, one, two, mixed, processor = pair
    model = PeftModel.from_pretrained(load_base(first), first)
    assert torch.equal(regimes.logits(model, processor), one)
    model.load_adapter(second, "second")
    assert torch.equal(regimes.logits(model, processor), mixed)
    model.set_adapter("second")
    assert torch.equal(regimes.logits(model, processor), two)
    model.set_adapter("default")
    assert torch.equal(regimes.logits(model, processor), mixed)


def test_transformers_uses_the_adapter_that_was_loaded_last_with_its_bridge(pair):
    first, second, _, two, mixed, processor = pair
    model = AutoModelForImageTextToText.from_pretrained(first)
    model.load_adapter(str(second), adapter_name="second")
    assert torch.equal(regimes.logits(model, processor), two)
    if Version(importlib.metadata.version("peft")) >= Version(MIN_PEFT_VERSION):
        model.set_adapter("default")
        assert torch.equal(regimes.logits(model, processor), mixed)


def test_transformers_swaps_an_adapter_and_its_bridge_for_another(pair):
    first, second, _, two, _, processor = pair
    model = AutoModelForImageTextToText.from_pretrained(first)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_adapter(str(second), adapter_name="default", hotswap=True)
    assert torch.equal(regimes.logits(model, processor), two)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_peft_swaps_adapters_that_hold_no_bridge(pairs):
    first, second = pairs["LoRA"]
    expected, processor = load_adapter(second)
    model = PeftModel.from_pretrained(load_base(first), first)
    hotswap_adapter(model, str(second), "default")
    assert torch.equal(regimes.logits(model, processor), regimes.logits(expected, processor))


def test_replacing_an_adapter_replaces_its_bridge_and_needs_no_more_memory(pair):
    first, second, one, two, _, processor = pair
    adapters = Adapters(first)
    assert torch.equal(regimes.logits(adapters.model, processor), one)
    before = {
        name: parameter.data_ptr() for name, parameter in adapters.model.named_parameters() if is_lora(name)
    }
    adapters.replace("first", second)
    assert torch.equal(regimes.logits(adapters.model, processor), two)
    assert {n: p.data_ptr() for n, p in adapters.model.named_parameters() if is_lora(n)} == before
    assert adapters.names == ["first"]


@pytest.mark.slow
def test_replacing_an_adapter_by_one_of_another_shape_is_refused(pairs, trained_start, tmp_path, monkeypatch):
    monkeypatch.chdir(trained_start)
    model, processor = regimes.build("lora.language={r: 3, lora_alpha: 8}")
    save_adapter(model, processor, tmp_path / "other")
    adapters = Adapters(pairs["bridge and LoRA"][0])
    with pytest.raises(UserError, match="differs from adapter first in r of LoRA"):
        adapters.replace("first", tmp_path / "other")
