"""Bad input to the real commands: one line (what, where, what to do) and exit code 2, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import XLMConfig, XLMWithLMHeadModel

from flamingo_ft import cli
from flamingo_ft.backbones import quantization
from flamingo_ft.backbones.language import NANO_FOLDER, load_language

RECIPE = """\
# a small run
model:
  vision: {name: nano}
  language: {name: nano}
  perceiver: {num_latents: 2, depth: 1, heads: 2, dim_head: 8}
data: {train: [{path: train.jsonl}]}
train: {output_dir: run, max_steps: 1, batch_size: 2, num_workers: 0}
"""
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "That."},
]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_rows(*rows):
    Path("train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one short run, with what it was made from beside it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("recipe.yaml").write_text(RECIPE)
        Image.new("RGB", (32, 32)).save("a.png")
        write_rows({"messages": MESSAGES, "images": ["a.png"]})
        assert cli.main(["train", "recipe.yaml"]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Image.new("RGB", (32, 32)).save("a.png")
    write_rows({"messages": MESSAGES, "images": ["a.png"]})
    return tmp_path


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a command that must exit with code 2."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_an_unknown_key_names_the_nearest(here, capsys):
    line = refused(capsys, "train", "recipe.yaml", "train.max_step=3")
    assert "train.max_step" in line and "did you mean train.max_steps?" in line


def test_a_wrong_type_names_the_expected_type(here, capsys):
    assert "must be a whole number, got 'many'" in refused(
        capsys, "train", "recipe.yaml", "train.max_steps=many"
    )


def test_a_missing_data_file_is_named(here, capsys):
    Path("train.jsonl").unlink()
    assert "train.jsonl" in refused(capsys, "train", "recipe.yaml")


def test_a_missing_recipe_is_named(here, capsys):
    assert "gone.yaml" in refused(capsys, "train", "gone.yaml")


def test_markers_that_do_not_match_the_images_are_refused(here, capsys):
    write_rows({"messages": MESSAGES, "images": ["a.png"]}, {"messages": MESSAGES, "images": []})
    line = refused(capsys, "train", "recipe.yaml")
    assert "train.jsonl: row 1: got 1 <image> markers but 0 images; add the missing images" in line


def test_a_missing_image_is_named(here, capsys):
    write_rows({"messages": MESSAGES, "images": ["b.png"]})
    assert "train.jsonl: row 0: images[0]: no such image" in refused(capsys, "train", "recipe.yaml")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(here, capsys, workers):
    Path("a.png").write_bytes(Path("a.png").read_bytes()[:40])
    line = refused(capsys, "train", "recipe.yaml", f"train.num_workers={workers}")
    assert "train.jsonl: row 0: " in line and "a.png: not a readable image" in line


def test_a_language_model_without_detectable_layers_names_the_override(here, capsys):
    tokenizer = load_language("nano").tokenizer
    config = XLMConfig(vocab_size=len(tokenizer) + 4, emb_dim=16, n_layers=2, n_heads=2, causal=True)
    XLMWithLMHeadModel(config).save_pretrained("xlm")
    tokenizer.save_pretrained("xlm")
    line = refused(capsys, "train", "recipe.yaml", "model.language.name=./xlm")
    assert "decoder_layers_attr_name" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.language.quantization=int4"],
            "model.language.quantization: must be 'none', 'int8', 'nf4' or 'fp4', got 'int4'",
        ),
        (
            ["model.vision={name: RN50, quantization: nf4}"],
            "vision tower ModifiedResNet has convolutions and no matrices",
        ),
        (
            ["model.language.quantization=nf4", "lora.language={}", "lora.init_lora_weights=pissa"],
            "lora.init_lora_weights: pissa takes the LoRA weights out of the matrix",
        ),
        (
            ["lora.language={target_modules: [query]}"],
            "lora.language.target_modules: query matches no matrix of the language part; "
            "it has model.layers.*.self_attn.q_proj",
        ),
        (["lora.perceiver={}"], "lora.perceiver: trainable.perceiver is true too"),
        (["model.init_from=."], " holds no adapter, merged model or checkpoint"),
        (
            ["train.activation_offload=true"],
            "train.activation_offload: got true, but no GPU is available; set it to false",
        ),
        (
            ["train.optimizer_in_backward=true", "train.gradient_accumulation_steps=2"],
            "the optimizer steps in every backward pass",
        ),
    ],
)
def test_impossible_quantization_lora_and_init_from_settings_are_refused(here, capsys, overrides, expected):
    assert expected in refused(capsys, "train", "recipe.yaml", *overrides)


def test_quantization_without_bitsandbytes_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(quantization, "bitsandbytes", lambda: None)
    line = refused(capsys, "train", "recipe.yaml", "model.language.quantization=nf4")
    assert "quantization nf4 needs bitsandbytes; pip install bitsandbytes, or use none" in line


def test_quantizing_a_quantized_language_model_is_refused(here, capsys):
    config = json.loads((NANO_FOLDER / "config.json").read_text())
    Path("gptq").mkdir()
    for path in NANO_FOLDER.iterdir():
        Path("gptq", path.name).write_bytes(path.read_bytes())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    Path("gptq", "config.json").write_text(json.dumps(config))
    line = refused(capsys, "train", "recipe.yaml", "model.language={name: ./gptq, quantization: nf4}")
    assert "is already quantized (gptq)" in line


def test_planning_with_a_missing_backbone_is_refused(here, capsys):
    assert "or OpenCLIP architecture; nearest known" in refused(
        capsys, "plan", "recipe.yaml", "model.vision.name=ViT-Q-77"
    )
    Path("empty").mkdir()
    assert "has no config.json" in refused(capsys, "plan", "recipe.yaml", "model.language.name=./empty")


def test_merging_a_folder_that_is_not_an_adapter_is_refused(here, capsys):
    assert "not an adapter" in refused(capsys, "merge", ".", "out")
    assert not Path("out").exists()


def test_an_earlier_run_is_never_overwritten(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    before = contents(Path("run"))
    line = refused(capsys, "train", "recipe.yaml")
    assert "run already holds a run; resume it with --resume, move it aside with --overwrite" in line
    assert contents(Path("run")) == before


def test_an_adapter_of_another_base_is_refused(trained, here, capsys):
    config = json.loads((trained / "run" / "config.json").read_text())
    config["backbones"]["vision"]["sha256"] = "0" * 64
    shutil.copytree(trained / "run", "other")
    Path("other", "config.json").write_text(json.dumps(config))
    line = refused(capsys, "generate", "other", "--image", "a.png", "--prompt", "What?")
    assert (
        "other: base mismatch: the adapter was trained on vision backbone nano with SHA-256 000000000000"
        in line
    )


def test_a_prompt_whose_markers_do_not_match_is_refused(trained, here, capsys):
    line = refused(capsys, "generate", trained / "run", "--image", "a.png", "--prompt", "<image> or <image>?")
    assert "prompt: got 2 <image> markers and 1 image; give one image for each marker" in line


def test_a_prompt_about_an_unreadable_image_is_refused(trained, here, capsys):
    Path("a.png").write_text("not an image")
    line = refused(capsys, "generate", trained / "run", "--image", "a.png", "--prompt", "What?")
    assert "a.png: not a readable image" in line


def test_generating_with_a_folder_that_is_not_an_adapter_is_refused(here, capsys):
    assert "not an adapter" in refused(capsys, "generate", ".", "--image", "a.png", "--prompt", "What?")


def test_evaluating_a_folder_that_is_not_a_run_is_refused(here, capsys):
    assert ".: not an adapter or a merged model; give the folder that a run or a conversion wrote" in refused(
        capsys, "eval", "."
    )


def test_evaluation_without_samples_is_refused(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    assert "data.eval is empty; name samples with --data FILE" in refused(capsys, "eval", "run")


def test_a_trained_adapter_answers(trained, here, capsys):
    torch.manual_seed(0)
    assert cli.main(["generate", str(trained / "run"), "--image", "a.png", "--prompt", "What?"]) == 0
    assert capsys.readouterr().out.strip()
