"""Several adapters on one base: each gives its own outputs in use; combinations; errors."""

import shutil
from pathlib import Path

import pytest
import torch

from flamingo_ft import Adapters
from flamingo_ft.adapters import load_adapter, save_adapter
from flamingo_ft.adapters.multi_adapter import peft_name
from flamingo_ft.errors import UserError

from ..regimes import LORA, build, logits, quantized, shake
from ..thinned import slow_except

WITH_LORA = (LORA, "lora.perceiver={r: 2}", "trainable.perceiver=false")


@pytest.fixture(scope="module", params=slow_except(["none"], ["none", "nf4"]))
def written(request, trained_start, tmp_path_factory):
    """Write two adapters with LoRA on two parts and a third with only a bridge; return the logits of each."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(trained_start, folder, dirs_exist_ok=True)
    form = quantized(request.param) if request.param != "none" else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, (name, overrides) in enumerate({"a": WITH_LORA, "b": WITH_LORA, "c": ()}.items()):
            model, processor = build(*overrides, *form)
            shake(model, 0.2, seed)
            save_adapter(model, processor, Path(name))
        return folder, {name: logits(*load_adapter(name)) for name in "abc"}


@pytest.fixture
def folders(written, tmp_path, monkeypatch):
    """Copy the adapters to the current directory; return the logits of each."""
    folder, expected = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return expected


def load_all() -> Adapters:
    adapters = Adapters("a", "a")
    for name in "bc":
        adapters.load(name, name)
    return adapters


def test_an_adapter_in_use_gives_its_own_logits(folders):
    adapters = load_all()
    assert adapters.names == ["a", "b", "c"] and adapters.in_use == "c"
    for name in "cabca":
        adapters.use(name)
        assert torch.equal(logits(adapters.model, adapters.processor), folders[name]), name


def test_a_bridge_stays_where_only_lora_is_switched(folders):
    adapters = load_all()
    adapters.use("a")
    latents = adapters.model.perceiver.latents.clone()
    adapters.use("b", bridge=False)
    assert torch.equal(adapters.model.perceiver.latents, latents)
    assert not torch.equal(logits(adapters.model, adapters.processor), folders["b"])


def test_disabled_removes_lora_only_inside_the_block(folders):
    adapters = load_all()
    adapters.use("a")
    with adapters.disabled():
        without = logits(adapters.model, adapters.processor)
    assert not torch.equal(without, folders["a"])
    assert torch.equal(logits(adapters.model, adapters.processor), folders["a"])
    adapters.use("c")
    with adapters.disabled():
        assert torch.equal(logits(adapters.model, adapters.processor), folders["c"])


def test_a_combination_of_one_adapter_is_that_adapter(folders):
    adapters = load_all()
    adapters.combine({"a": 1.0}, "again")
    actual = logits(adapters.model, adapters.processor)
    torch.testing.assert_close(actual, folders["a"], rtol=1e-4, atol=1e-4)


def test_a_linear_combination_averages_a_and_b_of_every_layer(folders):
    """PEFT combines A and B, each weighted by the root of weight times scaling, not their products."""
    adapters = load_all()
    adapters.combine({"a": 0.5, "b": 0.5}, "mean")
    for prefix in ("lang_encoder.", "perceiver."):
        layer = next(
            m
            for n, m in adapters.model.named_modules()
            if n.startswith(prefix) and hasattr(m, "lora_A") and m.lora_A
        )
        for matrix in (layer.lora_A, layer.lora_B):
            root = (0.5 * layer.scaling[peft_name("a")]) ** 0.5
            a, b, mean = (matrix[peft_name(name)].weight for name in ("a", "b", "mean"))
            torch.testing.assert_close(mean, root * (a + b))
        assert layer.scaling[peft_name("mean")] == 1.0


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_a_saved_combination_gives_the_same_logits(folders, method):
    torch.manual_seed(0)
    adapters = load_all()
    adapters.combine({"a": 0.7, "b": 0.3}, "both", method)
    assert adapters.in_use == "both"
    adapters.save("both")
    assert torch.equal(logits(*load_adapter("both")), logits(adapters.model, adapters.processor))


def test_loading_using_or_combining_the_wrong_adapters_is_refused(folders):
    adapters = load_all()
    with pytest.raises(UserError, match="an adapter named b is loaded already"):
        adapters.load("b", "b")
    with pytest.raises(UserError, match="no adapter named d; loaded are a, b, c"):
        adapters.use("d")
    with pytest.raises(UserError, match="adapter c has no LoRA to combine"):
        adapters.combine({"a": 1.0, "c": 1.0}, "ac")
    save_adapter(*build("lora.language={r: 2}"), Path("other"))
    adapters.load("other", "other")
    with pytest.raises(UserError, match="adapters a, other differ in r; combine adapters of the same shape"):
        adapters.combine({"a": 1.0, "other": 1.0}, "mixed")


def test_an_adapter_of_another_base_is_refused(folders):
    save_adapter(*build("model.cross_attn_every_n_layers=2"), Path("sparse"))
    save_adapter(*build(LORA, "model.init_from=start", "trainable.perceiver=false"), Path("second"))
    adapters = load_all()
    with pytest.raises(UserError, match="sparse: base mismatch: cross_attn_every_n_layers is 2, here 1"):
        adapters.load("sparse", "sparse")
    with pytest.raises(UserError, match="second: base mismatch: the adapter builds on another bridge"):
        adapters.load("second", "second")


def test_lora_on_the_tower_is_right_after_using_an_adapter_without_it(small_run):
    for name, overrides in {"a": (LORA,), "v": ("lora.vision={r: 2}",)}.items():
        model, processor = build(*overrides)
        shake(model, 0.2)
        save_adapter(model, processor, Path(name))
    adapters = Adapters("a", "a")
    adapters.load("v", "v")
    expected = logits(*load_adapter("v"))
    torch.testing.assert_close(logits(adapters.model, adapters.processor), expected, rtol=0, atol=1e-4)


def test_saving_an_adapter_leaves_out_the_lora_of_others(folders):
    model, processor = build(LORA)
    shake(model, 0.2)
    save_adapter(model, processor, Path("plain"))
    adapters = Adapters("plain", "plain")
    adapters.load("a", "a")
    adapters.use("plain")
    adapters.save("again")
    assert torch.equal(logits(*load_adapter("again")), logits(model, processor))


def test_adapters_whose_names_share_a_prefix_do_not_mix(small_run):
    for name, dtype in {"x": "fp32", "y": "bf16"}.items():
        model, processor = build(LORA, f"trainable.dtype={dtype}")
        shake(model, 0.2)
        save_adapter(model, processor, Path(name))
    adapters = Adapters("x", "run10")
    adapters.load("y", "run1")
    adapters.use("run10")
    assert torch.equal(logits(adapters.model, adapters.processor), logits(*load_adapter("x")))


def test_a_combination_with_a_taken_or_empty_name_is_refused(folders):
    adapters = load_all()
    for name, message in {
        "a": "an adapter named a is loaded already",
        "": "an adapter's name is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            adapters.combine({"a": 0.5, "b": 0.5}, name)
    with pytest.raises(UserError, match="no adapters to combine"):
        adapters.combine({}, "none")
    adapters.use("a")
    assert torch.equal(logits(adapters.model, adapters.processor), folders["a"])


NAMES = [
    "mlp",
    "model",
    "layers",
    "weight",
    "q_proj",
    "lora_A",
    "base_layer",
    "0",
    "default",
    "keys",
    "a.b",
    "a/b",
    "a%2Fb",
    "ä ö",
]


def test_an_adapter_may_have_the_name_of_a_module_or_any_other(small_run):
    for seed, name in enumerate("ab"):
        model, processor = build(LORA)
        shake(model, 0.2, seed)
        save_adapter(model, processor, Path(name))
    expected = [logits(*load_adapter(name)) for name in "ab"]
    adapters = Adapters("a", NAMES[0])
    for number, name in enumerate(NAMES[1:], start=1):
        adapters.load("ab"[number % 2], name)
    assert adapters.names == NAMES
    for number, name in enumerate(NAMES):
        adapters.use(name)
        assert adapters.in_use == name
        assert torch.equal(logits(adapters.model, adapters.processor), expected[number % 2]), name
    adapters.save("again")
    assert torch.equal(logits(*load_adapter("again")), logits(adapters.model, adapters.processor))
    adapters.replace("mlp", "b")
    assert torch.equal(logits(adapters.model, adapters.processor), expected[1])
    adapters.combine({"mlp": 0.5, "q_proj": 0.5}, "layers.0")
    adapters.save("both")
    assert torch.equal(logits(*load_adapter("both")), logits(adapters.model, adapters.processor))
