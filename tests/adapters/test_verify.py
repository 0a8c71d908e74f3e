"""A merged model is verified tensor by tensor: any fault is found and named."""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import flamingo_ft
from flamingo_ft.adapters import load_base, save_adapter, write_merged
from flamingo_ft.adapters.files import read_processor
from flamingo_ft.adapters.verify import verify_merge
from flamingo_ft.errors import UserError

from ..regimes import LORA, build, shake

UP, SQUARE = (
    "lang_encoder.model.layers.0.mlp.up_proj.weight",
    "lang_encoder.model.layers.1.self_attn.q_proj.weight",
)
NORM, GATE = "lang_encoder.model.norm.weight", "gated_cross_attn_layers.0.attn_gate"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def merges(trained_start, tmp_path_factory):
    """A folder with an adapter and its merged models in two dtypes; and the adapter's base."""
    folder = tmp_path_factory.mktemp("merges")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained_start)
        model, processor = build(
            LORA, "lora.vision={r: 2, target_modules: [in_proj]}", "lora.use_rslora=true"
        )
        shake(model, 0.1)
        save_adapter(model, processor, folder / "adapter")
    for name, dtype in DTYPES.items():
        (folder / name).mkdir()
        write_merged(folder / "adapter", folder / name, read_processor(folder / "adapter"), dtype=dtype)
    return folder, load_base(folder / "adapter", quantized=False)


def base_matrix(name: str) -> torch.Tensor:
    return flamingo_ft.load_language("nano").model.get_parameter(name.removeprefix("lang_encoder.")).detach()


def scaled(tensors: dict) -> str:
    """Scale LoRA by another alpha."""
    tensors[UP] = (base_matrix(UP) + 1.1 * (tensors[UP].float() - base_matrix(UP))).to(tensors[UP].dtype)
    return UP


def skipped(tensors: dict) -> str:
    tensors[UP] = base_matrix(UP).to(tensors[UP].dtype)
    return UP


def transposed(tensors: dict) -> str:
    tensors[SQUARE] = tensors[SQUARE].T.contiguous()
    return SQUARE


def one_bit_off(name: str) -> Callable[[dict], str]:
    def change(tensors: dict) -> str:
        tensors[name] = torch.nextafter(tensors[name], torch.full_like(tensors[name], 9.0))
        return name

    return change


def with_nan(tensors: dict) -> str:
    tensors[UP][0, 0] = torch.nan
    return UP


def missing(tensors: dict) -> str:
    del tensors[NORM]
    return NORM


def extra(tensors: dict) -> str:
    tensors["lang_encoder.more"] = torch.zeros(2)
    return "lang_encoder.more"


FAULTS = {"scaled": scaled, "skipped": skipped, "transposed": transposed, "NaN": with_nan}
FAULTS |= {
    "missing": missing,
    "extra": extra,
    "one bit of a norm": one_bit_off(NORM),
    "one bit of a gate": one_bit_off(GATE),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_written_tensor_is_found_and_named(merges, tmp_path, fault, dtype):
    folder, base = merges
    shutil.copytree(folder / dtype, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    changed = FAULTS[fault](tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="the merged model is wrong") as refused:
        verify_merge(tmp_path / "broken", folder / "adapter", base, DTYPES[dtype])
    assert changed in str(refused.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_merge_is_within_rounding_and_the_base_is_unchanged(merges, dtype):
    folder, base = merges
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    verified = verify_merge(folder / dtype, folder / "adapter", base, DTYPES[dtype])
    assert verified.tensors == len(load_file(folder / dtype / "model.safetensors"))
    assert verified.matrices_with_lora > 10 and verified.worst_error <= 1
    # The bound is tight: among many values, some are off by nearly half the spacing.
    assert dtype == "fp32" or verified.worst_error > 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_lora_of_another_matrix_is_not_accepted(merges, tmp_path):
    folder, base = merges
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = Path(tmp_path, "adapter", "adapter_model.safetensors")
    tensors = load_file(file)
    a, b = (
        name
        for name in tensors
        if name.endswith("up_proj.lora_B.weight") and (".0." in name or ".1." in name)
    )
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="up_proj.weight is .* times as far from W [+] scale"):
        verify_merge(folder / "fp32", tmp_path / "adapter", base, torch.float32)


FAMILIES = {
    # stores matrices as (in, out)
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2),
    # transformers holds its experts as one tensor and stores them one by one
    "mixtral": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ),
}


def slow_but_one():
    """Every combination; all are slow but the first, which is the one with experts in one tensor."""
    kinds = ("lora.use_dora=false", "lora.use_dora=true")
    first, *rest = product(("mixtral", "gpt2"), kinds, ("bf16", "dequantized"))
    return [first, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]


@pytest.mark.parametrize(("family", "kind", "base"), slow_but_one())
def test_matrices_with_converted_storage_are_verified_too(small_run, family, kind, base):
    nano = flamingo_ft.load_language("nano").tokenizer
    config = AutoConfig.for_model(family, **FAMILIES[family], vocab_size=len(nano))
    AutoModelForCausalLM.from_config(config).save_pretrained("lm")
    nano.save_pretrained("lm")
    model, processor = build("model.language.name=./lm", "model.language.quantization=nf4", LORA, kind)
    shake(model, 0.1)
    save_adapter(model, processor, Path("adapter"))
    for dtype in DTYPES.values():
        folder = Path(str(dtype))
        folder.mkdir()
        result = write_merged(Path("adapter"), folder, processor, base=base, dtype=dtype)
        assert result["verified"]["matrices_with_lora"] >= 8
