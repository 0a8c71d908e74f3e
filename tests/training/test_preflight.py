"""Checks before the first step: the loss of the model, memory, held-out images that are trained on."""

from __future__ import annotations

import json
import re
from collections import namedtuple

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.cli import main
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import gib
from flamingo_ft.model import build_flamingo
from flamingo_ft.model.build import backbone_files
from flamingo_ft.plan import planner
from flamingo_ft.training import preflight
from flamingo_ft.training import train as train_module
from flamingo_ft.training.build import make_trainer
from flamingo_ft.training.preflight import check_loss, check_packing, evaluation_warnings, memory_notice

from ..regimes import recipe, write_run

Memory = namedtuple("Memory", "available")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    return tmp_path


def test_the_planned_peak_is_compared_with_free_memory(folder, monkeypatch):
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: Memory(3 * 2**30))
    planned = gib(preflight.plan_memory(recipe(), device="cpu").peak)
    assert (
        memory_notice(recipe())
        == f"memory: planned peak {planned} GiB besides Python's own, 3.00 GiB of host RAM are free"
    )
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: Memory(2**20))
    line = memory_notice(recipe())
    assert line.startswith("warning: memory: planned peak") and "flamingo-ft plan says what to change" in line


def test_a_run_that_cannot_be_planned_says_why(folder, monkeypatch):
    def unknown(*_, **__):
        raise UserError("data.max_text_tokens: neither data nor a limit")

    monkeypatch.setattr(preflight, "plan_memory", unknown)
    assert memory_notice(recipe()) == "memory: not planned (data.max_text_tokens: neither data nor a limit)"


def test_a_model_with_data_dependent_shapes_is_not_planned(folder, monkeypatch):
    """Mixtures of experts, for example, choose experts by token."""
    monkeypatch.setattr(planner, "simulate_step", lambda *_: torch.ones(2).nonzero())
    line = memory_notice(recipe())
    assert line.startswith(
        "memory: not planned (model.language.name: a step of nano cannot be simulated without its weights"
    )


def test_a_gpu_failure_while_planning_is_raised(folder, monkeypatch):
    def failing(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(planner, "simulate_step", failing)
    with pytest.raises(RuntimeError, match="CUDA error"):
        memory_notice(recipe())


@pytest.mark.parametrize("leaks", [True, False])
def test_train_prints_memory_and_warns_of_held_out_images_that_are_trained_on(
    folder, whole_runs, capsys, leaks
):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    content = (folder / "0.png").read_bytes()
    (folder / "copy.png").write_bytes(
        content if leaks else content + b"\0"
    )  # the same picture in another file is for `check`
    (folder / "eval.jsonl").write_text(json.dumps(rows[0] | {"images": ["copy.png"]}))
    off = "eval={before: false, shuffled_images: false, max_new_tokens: 2}"
    assert main(["train", "./recipe.yaml", "data.eval=[{path: eval.jsonl}]", off]) == 0
    printed, output = capsys.readouterr()
    assert "\nreport in run/report.html\nadapter in run; try it: flamingo-ft generate run --image " in printed
    assert re.search(
        r"memory: planned peak \d+\.\d+ GiB besides Python's own, \d+\.\d\d GiB of host RAM are free", output
    )
    assert ("warning: an image of 1 of 1 held-out sample is trained on too" in output) == leaks
    assert not leaks or re.search(r"first \S*eval.jsonl: row 0, trained on in \S*train.jsonl: row 0", output)


def test_train_warns_of_a_method_that_refines_a_model_where_the_bridge_is_new(folder, monkeypatch):
    monkeypatch.setattr(train_module, "_run", lambda *arguments: {})
    for method, warned in (("kto", True), ("sft", False)):
        lines: list[str] = []
        config = recipe(f"train.method={method}", f"train.output_dir={method}", "train.batch_size=2")
        train_module.train(config, log=lines.append)
        assert any(line.startswith("warning: train.method kto refines") for line in lines) == warned


def test_held_out_boxes_that_the_crop_cuts_off_cause_a_warning(folder):
    Image.new("RGB", (200, 100)).save(folder / "wide.png")
    row = {"image": "wide.png", "question": "Where?", "answer": "<box>", "boxes": [[30, 10, 90, 50]]}
    (folder / "boxes.jsonl").write_text(json.dumps(row))
    for resize_mode, warned in (("shortest", True), ("squash", False)):
        values = [f"model.vision.resize_mode={resize_mode}", "data.eval=[{path: boxes.jsonl}]"]
        config = recipe(*values)
        data, processor = open_data(config.data, 0), backbone_files(config.model).processor()
        samples = data.with_boxes_written(data.eval_samples(), processor)
        lines = [*evaluation_warnings(data, samples, processor, max_new_tokens=64)]
        assert (
            lines
            == [
                "warning: the tower's crop to the middle of the image cuts off 1 of 1 held-out boxes; "
                "set model.vision.resize_mode to squash or longest, or data.tiles"
            ]
            * warned
        )


# --- the language model's own loss ---


def trainer_for(model_type: str, **options):
    tokenizer = load_language("nano").tokenizer
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**SIZES, **options})
    language = LanguageBackbone(AutoModelForCausalLM.from_config(config), tokenizer, {"name": model_type})
    sizes = {"num_latents": 2, "depth": 1, "heads": 2, "dim_head": 8}
    model, processor = build_flamingo(load_vision("nano"), language, perceiver=sizes)
    config = recipe()
    set_trainable(model, config.trainable)
    return make_trainer(model, processor, open_data(config.data, 0), config, [])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "gemma2", "cohere"])
def test_families_with_a_plain_head_train(folder, family):
    assert trainer_for(family, num_key_value_heads=2, head_dim=16)


@pytest.mark.parametrize(
    ("family", "options"), [("bert", {"is_decoder": True}), ("roberta", {"is_decoder": True})]
)
def test_families_with_a_transform_in_the_head_are_refused(folder, family, options):
    with pytest.raises(UserError, match=f"TRL's training loss is wrong for a {family} model"):
        trainer_for(family, **options)


def test_running_out_of_memory_in_a_check_is_not_blamed_on_the_model_family(folder, monkeypatch):
    def gpu_is_full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    trainer = trainer_for("llama", num_key_value_heads=2, head_dim=16)
    monkeypatch.setattr(trainer.model, "forward", gpu_is_full)
    with pytest.raises(torch.OutOfMemoryError):
        check_loss(trainer)
    with pytest.raises(torch.OutOfMemoryError):
        check_packing(trainer.model)
