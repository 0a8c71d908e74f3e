"""Merging a real language model, SmolLM2-135M-Instruct, in every combination of format, base and dtype.

What 4 bits, or leaving them, do to its logits is far more than to a nano model's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flamingo_ft import cli
from flamingo_ft.adapters import write_merged
from flamingo_ft.adapters.files import read_processor
from flamingo_ft.config.library import packaged_recipes

from .. import real_weights

MISSING = real_weights.missing(real_weights.SMOLLM2)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

FORMATS = ("none", "int8", "nf4", "fp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS = 2  # of 30, where each matrix is looked at but nothing is answered
SMALL = (
    "model.perceiver={num_latents: 4, depth: 1, heads: 2, dim_head: 16}", "model.cross_attn_every_n_layers=6",
    "lora.language={r: 8, lora_alpha: 16}", "train.max_steps=6", "train.batch_size=2", "train.warmup_steps=0",
    "eval.before=false", "eval.shuffled_images=false", "eval.max_samples=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folders with the model: whole, and its first layers alone."""
    model, tokenizer = real_weights.smollm2()
    folder = tmp_path_factory.mktemp("smollm2")
    for name in ("whole", "first_layers"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:LAYERS], LAYERS
    return folder


def train(language: Path, form: str, out: Path) -> Path:
    """An adapter of six steps, both backbones in a format."""
    formats = (f"model.{part}.quantization={form}" for part in ("language", "vision"))
    backbones = [f"model.language.name={language}", *formats]
    recipe = str(packaged_recipes()["quickstart"])
    assert cli.main(["train", recipe, *backbones, *SMALL, f"train.output_dir={out}"]) == 0
    return out


@pytest.mark.parametrize("form", FORMATS)
def test_every_base_and_dtype_is_right_matrix_by_matrix(smollm2, tmp_path, form):
    run = train(smollm2 / "first_layers", form, tmp_path / "run")
    # A matrix is rounded to its dtype once it is made, whatever the format.
    dtypes = DTYPES if form == "nf4" else (torch.bfloat16,)
    for base in ("bf16", "dequantized"):
        for dtype in dtypes:
            folder = tmp_path / f"{base} {dtype}"
            folder.mkdir()
            verified = write_merged(run, folder, read_processor(run), base=base, dtype=dtype)["verified"]
            assert verified["matrices_with_lora"] == 7 * LAYERS and verified["worst_error"] <= 1


def test_the_default_merge_of_a_4_bit_model_is_accepted_and_reports_its_cost(smollm2, tmp_path, capsys):
    run, merged = train(smollm2 / "whole", "nf4", tmp_path / "run"), tmp_path / "merged"
    assert cli.main(["merge", str(run), str(merged), "--samples", "8"]) == 0
    report = json.loads((merged / "merge.json").read_text())
    assert report["verified"]["matrices_with_lora"] == 210
    loss = report["cost"]["loss"]
    assert loss.keys() == {"adapter", "adapter_on_unquantized_base", "merged"}
    assert loss.keys() == report["cost"]["accuracy"].keys()
    assert abs(loss["merged"] - loss["adapter_on_unquantized_base"]) < 0.1  # bf16 itself costs little
    assert report["relative"] > 0.05  # logits differ even so: they do not show how good a merge is
    assert "adapter on its unquantized base" in capsys.readouterr().out
