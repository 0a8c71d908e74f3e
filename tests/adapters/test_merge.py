"""A merged model equals its adapter, needs no base, and never overwrites anything."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import flamingo_ft
from flamingo_ft import cli
from flamingo_ft.adapters import load_adapter, load_trained, save_adapter
from flamingo_ft.adapters import merge as merging
from flamingo_ft.backbones.quantization import Quantization, dequantized_weight, quantization_formats
from flamingo_ft.cli import models
from flamingo_ft.config import dump_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation import merging as merging_quality
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS

from ..regimes import LORA, REGIMES, build, inputs, logits, quantized, recipe, shake
from ..thinned import slow, slow_except

ROOT = Path(flamingo_ft.__file__).parents[1]


def write_adapter(*overrides: str) -> torch.Tensor:
    """Write an adapter to `adapter`; return its logits."""
    model, processor = build(*overrides)
    shake(model, 0.03)
    save_adapter(model, processor, Path("adapter"))
    return logits(model, processor)


def write_recipe(folder: str, *overrides: str) -> None:
    """Put the run's recipe beside an adapter."""
    Path(folder, "resolved_recipe.yaml").write_text(dump_recipe(recipe(*overrides)))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


KINDS = ("lora.use_dora=true", "lora.use_rslora=true", "lora.init_lora_weights=pissa")
EVERYWHERE = "LoRA everywhere"  # covers the other regimes, whose kinds are slow tests
PLAIN = ("bridge", EVERYWHERE)
OF_EACH_KIND = [
    pytest.param(regime, (kind,), marks=[pytest.mark.slow] * ((regime, kind) != (EVERYWHERE, KINDS[0])))
    for regime in REGIMES
    if regime != "bridge"
    for kind in KINDS
]


@pytest.mark.parametrize(
    ("regime", "extra"),
    [
        *(pytest.param(regime, (), marks=[pytest.mark.slow] * (regime not in PLAIN)) for regime in REGIMES),
        *OF_EACH_KIND,
    ],
)
def test_merged_equals_unmerged(small_run, regime, extra):
    expected = write_adapter(*REGIMES[regime], *extra)
    report = merge_adapter("adapter", "merged", dtype=torch.float32)
    loaded, processor = load_trained("merged")
    limit = 1e-4 if any("pissa" in option for option in extra) else 1e-5  # PiSSA's residual base was rounded
    assert relative_error(logits(loaded, processor), expected) < limit
    assert report["relative"] < limit and report["token_agreement"] == 1.0
    assert json.loads(Path("merged", "merge.json").read_text()) == report


@pytest.mark.parametrize("regime", slow_except([EVERYWHERE], REGIMES))
def test_merged_into_the_dequantized_base_equals_unmerged(small_run, regime):
    expected = write_adapter(*REGIMES[regime], *quantized("nf4", regime))
    merge_adapter("adapter", "merged", base="dequantized", dtype=torch.float32)
    assert relative_error(logits(*load_trained("merged")), expected) < 1e-4


@pytest.mark.parametrize("form", slow_except(["nf4"], ["nf4", "int8"]))
def test_merged_into_the_unquantized_base_is_the_base_plus_the_adapters_lora(small_run, form):
    """W + scaling * B A of the original W, entry by entry, in float64."""
    write_adapter(*REGIMES["bridge and LoRA"], *quantized(form))
    merge_adapter("adapter", "merged", dtype=torch.float32)
    name = "lang_encoder.model.layers.1.mlp.up_proj"
    tensors = load_file(Path("adapter", ADAPTER_WEIGHTS))
    merged = load_file(Path("merged", "model.safetensors"))
    a, b = (tensors[f"base_model.model.{name}.lora_{matrix}.weight"].double() for matrix in "AB")
    original = (
        flamingo_ft.load_language("nano").model.get_submodule(name.removeprefix("lang_encoder.")).weight
    )
    torch.testing.assert_close(
        merged[f"{name}.weight"].double(), original.double() + 2 * b @ a, rtol=0, atol=1e-6
    )


@pytest.mark.slow
def test_transformers_loads_a_merged_model_after_importing_the_package(small_run):
    expected = write_adapter(LORA, "lora.vision={r: 2}")
    merge_adapter("adapter", "merged", dtype=torch.float32)
    script = (
        "import torch; import flamingo_ft; from transformers import AutoModelForImageTextToText;"
        "model = AutoModelForImageTextToText.from_pretrained('merged').eval();"
        "assert not hasattr(model, 'peft_config');"
        "assert not any('lora' in name for name, _ in model.named_parameters());"
        "inputs = torch.load('inputs.pt');"
        "torch.save(model(**inputs).logits.detach(), 'logits.pt')"
    )
    torch.save(inputs(AutoProcessor.from_pretrained("merged")), "inputs.pt")
    process = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert relative_error(torch.load("logits.pt"), expected) < 1e-5


def test_a_merged_model_has_float32_gates_and_the_requested_dtype_elsewhere(small_run):
    write_adapter(LORA)
    merge_adapter("adapter", "merged")
    written = load_file(Path("merged", "model.safetensors"))
    model = AutoModelForImageTextToText.from_pretrained("merged")
    for tensors in (written, dict(model.named_parameters())):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                assert tensor.dtype == (torch.float32 if name.endswith("_gate") else torch.bfloat16), name


@pytest.mark.parametrize(
    "options", [slow({"load_in_8bit": True}), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}]
)
def test_a_merged_model_is_quantized_again_by_transformers(small_run, options):
    expected = write_adapter(LORA)
    merge_adapter("adapter", "merged", dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(
        "merged", quantization_config=BitsAndBytesConfig(**options)
    )
    assert quantization_formats(model.vision_encoder) == quantization_formats(model.lang_encoder) != set()
    assert relative_error(logits(model, AutoProcessor.from_pretrained("merged")), expected) < 0.25


def test_a_merged_model_is_written_quantized_on_request(small_run):
    expected = write_adapter(LORA)
    report = merge_adapter("adapter", "merged", dtype=torch.float32, quantization=Quantization("nf4"))
    assert report["quantization"]["format"] == "nf4"
    model, processor = load_trained("merged")
    assert quantization_formats(model) == {"4bit"}
    assert relative_error(logits(model, processor), expected) < 0.25


@pytest.mark.slow
def test_large_models_are_written_in_shards(small_run, monkeypatch):
    expected = write_adapter(LORA)
    monkeypatch.setattr(merging, "LARGEST_SHARD", "1MB")
    merge_adapter("adapter", "merged", dtype=torch.float32)
    assert len(list(Path("merged").glob("model-*.safetensors"))) > 2
    assert relative_error(logits(*load_trained("merged")), expected) < 1e-5


@pytest.mark.slow
def test_the_dequantized_base_does_not_depend_on_the_merged_dtype(small_run):
    write_adapter(LORA, *quantized("nf4"))
    trained = load_adapter("adapter")[0].get_submodule("lang_encoder.model.layers.0.mlp.up_proj")
    merge_adapter("adapter", "merged", base="dequantized")
    written = load_file(Path("merged", "model.safetensors"))["lang_encoder.model.layers.0.mlp.up_proj.weight"]
    update = 2 * trained.lora_B["default"].weight @ trained.lora_A["default"].weight
    expected = dequantized_weight(trained.get_base_layer()) + update
    # The matrix, then the sum, is rounded to bf16; other codes would be off by 28 %.
    rounding = 2**-7 * float(expected.abs().max())
    torch.testing.assert_close(written.float(), expected, rtol=0, atol=rounding)


@pytest.mark.slow
def test_a_folder_with_the_hidden_name_of_a_merge_is_not_deleted(small_run):
    write_adapter(LORA)
    Path("merged.unfinished").mkdir()
    Path("merged.unfinished", "mine").write_text("mine")
    merge_adapter("adapter", "sub/merged", dtype=torch.float32)
    merge_adapter("adapter", "merged", dtype=torch.float32)
    assert Path("merged.unfinished", "mine").read_text() == "mine"
    assert sorted(path.name for path in Path("sub").iterdir()) == ["merged"]


@pytest.mark.slow
def test_a_merge_is_measured_on_eval_samples_else_training_samples_else_made_up_prompts(small_run):
    write_adapter(LORA)
    assert "made-up" in merge_adapter("adapter", "first", dtype=torch.float32)["prompts_from"]
    write_recipe("adapter")
    assert "was trained on" in merge_adapter("adapter", "second", dtype=torch.float32)["prompts_from"]
    write_recipe("adapter", "data.eval=[{path: train.jsonl}]")
    report = merge_adapter("adapter", "third", dtype=torch.float32)
    assert report["prompts_from"] == "held-out samples of the run"
    assert report["cost"]["samples"] == report["cost"]["answers"] == 2


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer.json"])
def test_a_damaged_file_is_reported_in_one_line(small_run, capsys, name):
    write_adapter(LORA)
    Path("adapter", name).write_text("{")
    assert "adapter: " in refused(capsys, "adapter", "merged")
    Path("adapter", name).unlink()
    refused(capsys, "adapter", "merged")


def test_a_folder_of_another_model_is_reported_in_one_line(small_run, capsys):
    flamingo_ft.load_language("nano").model.save_pretrained("llama")
    assert cli.main(["generate", "llama", "--prompt", "What?"]) == 2
    assert (
        "llama: holds a llama model; give the folder that a run or a merge wrote" in capsys.readouterr().err
    )


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["merge", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_merging_twice_or_into_an_existing_folder_is_refused(small_run, capsys):
    write_adapter(LORA)
    assert cli.main(["merge", "adapter", "merged", "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert "verified " in shown and "token agreement 100.0 %" in shown and "loss +0.0000" in shown
    before = {path.name: path.read_bytes() for path in Path("merged").iterdir()}
    assert "merged: exists, and nothing is overwritten" in refused(capsys, "adapter", "merged")
    assert "merged: is a merged model already" in refused(capsys, "merged", "again")
    assert {path.name: path.read_bytes() for path in Path("merged").iterdir()} == before
    assert not Path("again").exists()


def test_merging_onto_another_base_is_refused(small_run, capsys):
    write_adapter(LORA)
    config = json.loads(Path("adapter", "config.json").read_text())
    config["backbones"]["language"]["sha256"] = "0" * 64
    Path("adapter", "config.json").write_text(json.dumps(config))
    assert "base mismatch: the adapter was trained on language backbone nano with SHA-256" in refused(
        capsys, "adapter", "merged"
    )
    assert not Path("merged").exists()


@pytest.mark.filterwarnings("ignore:merge. tolerance")
def test_a_tolerance_on_the_command_line_still_refuses_logits_beyond_it(small_run, capsys):
    write_adapter(LORA)
    line = refused(capsys, "adapter", "merged", "--tolerance", "1e-9")
    assert "beyond the tolerance of 1e-09; merge with --dtype fp32, or leave --tolerance out" in line
    assert not list(Path.cwd().glob("merged*"))


@pytest.mark.slow
def test_a_tolerance_is_deprecated(small_run):
    write_adapter(LORA)
    with pytest.warns(FutureWarning, match="tolerance .* is deprecated; use margin"):
        assert merge_adapter("adapter", "merged", tolerance=2.0)["tolerance"] == 2.0


UP, SQUARE = (
    "lang_encoder.model.layers.0.mlp.up_proj.weight",
    "lang_encoder.model.layers.1.self_attn.q_proj.weight",
)


def base_matrix(name: str) -> torch.Tensor:
    return flamingo_ft.load_language("nano").model.get_parameter(name.removeprefix("lang_encoder.")).detach()


def test_a_wrong_merge_is_refused_whatever_the_margins(small_run, capsys, monkeypatch):
    write_adapter(LORA)
    fold = merging.fold_lora

    def with_a_fault(model, dtype):
        parts = fold(model, dtype)
        model.get_parameter(UP).data.mul_(1.01)
        return parts

    monkeypatch.setattr(merging, "fold_lora", with_a_fault)
    line = refused(capsys, "adapter", "merged", "--margin", "1000", "--accuracy-margin", "1")
    assert f"the merged model is wrong: {UP} is " in line
    assert not list(Path.cwd().glob("merged*"))


@pytest.mark.parametrize("dtype", slow_except([torch.bfloat16], [torch.bfloat16, torch.float16]), ids=str)
def test_a_merged_matrix_is_rounded_once(small_run, dtype):
    """It is within half the dtype's spacing of W + scaling * B A: the base is not rounded before the sum."""
    write_adapter(LORA)
    merge_adapter("adapter", "merged", dtype=dtype)
    tensors = load_file(Path("adapter", ADAPTER_WEIGHTS))
    written = load_file(Path("merged", "model.safetensors"))
    for name in (UP, SQUARE):
        a, b = (
            tensors[f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"].double()
            for part in "AB"
        )
        exact = base_matrix(name).double() + 2 * b @ a
        half_spacing = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * exact.abs().max()
        assert ((written[name].double() - exact).abs() <= half_spacing).all()


@pytest.mark.slow
def test_the_effect_of_quantization_alone_is_measured_too(small_run):
    write_adapter(LORA, *quantized("nf4"))
    report = merge_adapter("adapter", "merged", quantization=Quantization("nf4"), margin=10.0)
    rows = ["adapter", "adapter_on_unquantized_base", "merged_before_quantization", "merged"]
    assert list(report["cost"]["loss"]) == list(report["cost"]["accuracy"]) == rows
    assert quantization_formats(load_trained("merged")[0]) == {"4bit"}


def test_an_adapter_with_nan_or_inf_is_refused_with_the_tensors_name(small_run, capsys):
    write_adapter(LORA)
    tensors = load_file(Path("adapter", ADAPTER_WEIGHTS))
    name = next(name for name in tensors if name.endswith("up_proj.lora_B.weight"))
    tensors[name][0] = torch.nan
    save_file(tensors, Path("adapter", ADAPTER_WEIGHTS), {"format": "pt"})
    assert f"{name.removeprefix('base_model.model.')} has non-finite values" in refused(
        capsys, "adapter", "merged"
    )


def test_the_command_line_and_the_function_have_the_same_defaults():
    command, function = (inspect.signature(one).parameters for one in (models.merge, merge_adapter))
    for name in ("samples", "margin", "accuracy_margin", "tolerance", "with_code"):
        assert command[name].default == function[name].default, name


@pytest.mark.slow
def test_a_reference_model_that_runs_out_of_memory_is_left_out(small_run, monkeypatch):
    write_adapter(LORA, *quantized("nf4"))
    load = merging_quality.load_adapter

    def too_large(*arguments, quantized=True, **options):
        if not quantized:
            raise torch.OutOfMemoryError
        return load(*arguments, **options)

    monkeypatch.setattr(merging_quality, "load_adapter", too_large)
    assert list(merge_adapter("adapter", "merged", margin=10.0)["cost"]["loss"]) == ["adapter", "merged"]


def test_a_value_beyond_float16_is_refused(small_run, capsys):
    write_adapter(LORA)
    tensors = load_file(Path("adapter", ADAPTER_WEIGHTS))
    name = next(name for name in tensors if name.endswith("up_proj.lora_B.weight"))
    tensors[name][0] = 1e6
    save_file(tensors, Path("adapter", ADAPTER_WEIGHTS), {"format": "pt"})
    line = refused(capsys, "adapter", "merged", "--dtype", "fp16")
    assert "up_proj.weight: float16 holds values up to 65,504, got " in line and "use bfloat16 (bf16)" in line
    assert not list(Path.cwd().glob("merged*"))


def test_a_damaged_adapter_is_refused(small_run, capsys):
    write_adapter(LORA)
    tensors = load_file(Path("adapter", ADAPTER_WEIGHTS))
    save_file(
        {name: tensor for name, tensor in tensors.items() if "lora_B" not in name},
        Path("adapter", ADAPTER_WEIGHTS),
    )
    assert "lacks 28 of its weights" in refused(capsys, "adapter", "merged")


def test_a_model_with_lora_is_not_saved_whole_by_mistake(small_run):
    model, _ = build(LORA)
    with pytest.raises(UserError, match="a Flamingo with LoRA cannot be saved whole"):
        model.save_pretrained("whole")
    assert not Path("whole").exists()
    assert load_adapter("start")[0].save_pretrained("whole") is None
