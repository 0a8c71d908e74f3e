"""``from_pretrained`` loads merged models, adapters and compositions."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import flamingo_ft
from flamingo_ft.adapters import load_adapter, load_base, name_base, save_adapter, write_composition
from flamingo_ft.adapters.files import BRIDGE_FILE
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.merging import merge_adapter

from .. import regimes

PACKAGE = Path(flamingo_ft.__file__).parent
RUNS = {
    "bridge": regimes.REGIMES["bridge"],
    "bridge and LoRA": regimes.REGIMES["bridge and LoRA"],
    "LoRA everywhere": regimes.REGIMES["LoRA everywhere"],
    "quantized": (*regimes.REGIMES["LoRA everywhere"], *regimes.quantized("nf4", "LoRA")),
}

SLOW = ("bridge and LoRA", "quantized")
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in RUNS]
)


@pytest.fixture(scope="module")
def adapters(trained_start, tmp_path_factory):
    """A folder with an adapter of each kind, and the bridge that some of them build on."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(trained_start, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, overrides in RUNS.items():
            model, processor = regimes.build(*overrides)
            regimes.shake(model, 0.3)
            save_adapter(model, processor, folder / name)
    return folder


def auto(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def adapter_with_base(adapters, kind, tmp_path):
    """Copy an adapter beside its composition, which it names; return both folders."""
    write_composition(adapters / kind, tmp_path / "base")
    shutil.copytree(adapters / kind, tmp_path / "adapter")
    name_base(tmp_path / "adapter", str(tmp_path / "base"))
    return tmp_path / "adapter", tmp_path / "base"


def test_a_base_is_named_in_adapters_alone(tmp_path):
    with pytest.raises(UserError, match="not an adapter, adapter_config.json not found"):
        name_base(tmp_path, "org/base")


@each_kind
def test_from_pretrained_loads_an_adapter_as_load_adapter_does(adapters, kind):
    expected, processor = load_adapter(adapters / kind)
    actual = auto(adapters / kind)
    assert torch.equal(regimes.logits(actual, processor), regimes.logits(expected, processor))
    assert {n: p.dtype for n, p in actual.named_parameters()} == {
        n: p.dtype for n, p in expected.named_parameters()
    }
    assert not any(parameter.requires_grad for parameter in actual.parameters())


@each_kind
def test_a_composition_loads_as_the_base_of_its_adapter(adapters, kind, tmp_path):
    write_composition(adapters / kind, tmp_path / "base")
    torch.manual_seed(0)
    expected = load_base(adapters / kind)
    torch.manual_seed(0)
    actual, processor = auto(tmp_path / "base"), AutoProcessor.from_pretrained(tmp_path / "base")
    assert torch.equal(regimes.logits(actual, processor), regimes.logits(expected, processor))
    assert sorted(actual.state_dict()) == sorted(expected.state_dict())
    assert (tmp_path / "base" / BRIDGE_FILE).exists() == (kind in ("LoRA everywhere", "quantized"))


@each_kind
def test_autopeft_loads_an_adapter_that_names_its_composition(adapters, kind, tmp_path):
    adapter, _ = adapter_with_base(adapters, kind, tmp_path)
    expected, processor = load_adapter(adapters / kind)
    actual = AutoPeftModel.from_pretrained(adapter, import_allowlist=["flamingo_ft"])
    assert torch.equal(regimes.logits(actual, processor), regimes.logits(expected, processor))
    assert sum(p.numel() for p in actual.parameters()) == sum(p.numel() for p in expected.parameters())


def test_an_adapter_finds_the_bridge_that_it_builds_on_in_its_composition(adapters, tmp_path):
    adapter, _ = adapter_with_base(adapters, "LoRA everywhere", tmp_path)
    expected, processor = load_adapter(adapters / "LoRA everywhere")
    (adapters / "start").rename(adapters / "gone")
    try:
        with pytest.raises(UserError, match="is not there"):
            load_adapter(adapters / "LoRA everywhere")
        assert torch.equal(regimes.logits(auto(adapter), processor), regimes.logits(expected, processor))
    finally:
        (adapters / "gone").rename(adapters / "start")


def test_saving_an_adapter_that_names_its_composition_keeps_every_byte(adapters, tmp_path):
    for kind in ("bridge", "LoRA everywhere"):
        adapter, _ = adapter_with_base(adapters, kind, tmp_path / kind)
        save_adapter(*load_adapter(adapter), tmp_path / kind / "again")
        for path in adapter.iterdir():
            assert path.read_bytes() == (tmp_path / kind / "again" / path.name).read_bytes(), path.name


def test_compositions_of_one_base_are_identical_and_hold_no_path(adapters, tmp_path):
    again = shutil.copytree(adapters / "LoRA everywhere", tmp_path / "again")
    shutil.copytree(adapters / "start", tmp_path / "start")
    for number, adapter in enumerate((adapters / "LoRA everywhere", again)):
        write_composition(adapter, tmp_path / f"{number}")
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes(), path.name
        for directory in (adapters, PACKAGE):
            assert str(directory).encode() not in path.read_bytes(), path.name
    with pytest.raises(UserError, match="exists, and nothing"):
        write_composition(adapters / "bridge", tmp_path / "0")


def test_a_changed_bridge_in_a_composition_is_refused(adapters, tmp_path):
    _, base = adapter_with_base(adapters, "LoRA everywhere", tmp_path)
    weights = base / BRIDGE_FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="base mismatch: the adapter was trained on a bridge with SHA-256"):
        auto(base)
    assert load_file(weights)


def test_auto_classes_load_configuration_and_processor_of_adapters_and_compositions(adapters, tmp_path):
    adapter, base = adapter_with_base(adapters, "bridge", tmp_path)
    for folder in (adapter, base):
        assert isinstance(AutoConfig.from_pretrained(folder), flamingo_ft.FlamingoConfig)
        assert isinstance(AutoProcessor.from_pretrained(folder), flamingo_ft.FlamingoProcessor)


@pytest.mark.slow
def test_a_merged_model_gives_the_adapters_logits(adapters, tmp_path):
    merge_adapter(adapters / "bridge and LoRA", tmp_path / "merged", dtype=torch.float32, with_code=True)
    expected, processor = load_adapter(adapters / "bridge and LoRA")
    difference = regimes.logits(auto(tmp_path / "merged"), processor) - regimes.logits(expected, processor)
    assert difference.abs().max() < 1e-4
    assert (tmp_path / "merged" / "flamingo_model_modeling.py").is_file()


def test_a_dtype_applies_to_all_weights_but_the_gates(adapters):
    model = auto(adapters / "bridge and LoRA", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("_gate") else torch.bfloat16), name
    quantized = auto(adapters / "quantized", dtype="bfloat16")
    dtypes = {parameter.dtype for parameter in quantized.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16, torch.uint8}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_a_device_map_of_one_device_is_supported(adapters, device_map):
    if not (device_map == "auto" and torch.cuda.is_available()):
        assert auto(adapters / "bridge", device_map=device_map).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"perceiver": 0, "": "cpu"}}, "is not a single device; use one"),
        ({"device_map": "balanced"}, "is not a single device; use one"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            "configuration fixes the quantization; merge the adapter",
        ),
        ({"state_dict": {}}, "does not support state_dict"),
        ({"dtype": "small"}, "is not a torch dtype"),
    ],
)
def test_unsupported_options_are_refused_in_one_line(adapters, options, message):
    with pytest.raises(UserError, match=message) as error:
        flamingo_ft.FlamingoForConditionalGeneration.from_pretrained(adapters / "bridge", **options)
    assert "\n" not in str(error.value)


def test_an_attention_implementation_reaches_the_language_model(adapters):
    model, default = auto(adapters / "bridge", attn_implementation="eager"), auto(adapters / "bridge")
    assert model.lang_encoder.config._attn_implementation == "eager"
    assert default.lang_encoder.config._attn_implementation != "eager"


@pytest.mark.parametrize("change", [{"media_visibility": "all_preceding"}, {"output_hidden_states": True}])
def test_a_changed_configuration_is_refused(adapters, change):
    with pytest.raises(UserError, match=f"does not support {next(iter(change))} "):
        auto(adapters / "bridge", **change)


def test_the_loading_report_is_empty(adapters):
    _, report = auto(adapters / "bridge", output_loading_info=True)
    assert not any(report.values())
