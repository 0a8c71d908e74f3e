"""The planned memory equals that of a real step on a CPU, planned sizes those in OpenFlamingo's paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GPTNeoXConfig, MptConfig, PreTrainedConfig

from flamingo_ft import cli
from flamingo_ft.backbones.language import NANO_FOLDER
from flamingo_ft.config import RELEASED_PERCEIVER, Recipe, load_recipe
from flamingo_ft.config.tables import CROSS_ATTENTION, PERCEIVER
from flamingo_ft.data import encode, open_data
from flamingo_ft.data.render import apply_template
from flamingo_ft.formatting import GIB
from flamingo_ft.model.build import backbone_files, text_limit
from flamingo_ft.model.label_positions import LabelPositions
from flamingo_ft.model.parts import trainable_parameters
from flamingo_ft.plan import Plan, Planner, plan_memory
from flamingo_ft.plan.longest_batch import Batch, longest_batch
from flamingo_ft.plan.memory_tracker import MemoryTracker
from flamingo_ft.plan.meta_model import build_meta_model
from flamingo_ft.plan.plan_report import Gpu, suggest_changes, with_values
from flamingo_ft.training.build import build_model, first_batches, make_trainer
from tests.thinned import slow

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
NF4 = "model.language.quantization=nf4"
LORA = "lora.language={r: 8}"
CHECKPOINTING = "train.gradient_checkpointing=true"
GRPO = "train.grpo={num_generations: 4, max_completion_tokens: 8, beta: 0.1}"
CASES = {  # every recipe key that changes memory is in one of them
    "defaults": [],
    "nf4, LoRA alone, checkpointing": [
        NF4,
        LORA,
        "trainable={perceiver: false, cross_attention: false, new_tokens: false}",
        CHECKPOINTING,
    ],
    "int8, the tower too, accumulation, LoRA, Muon": [
        "model.language.quantization=int8",
        "model.vision.quantization=int8",
        "train.gradient_accumulation_steps=2",
        LORA,
        "train.optimizer=muon",
    ],
    "nf4 with single quantization, the tower too, computing in bf16, 8-bit AdamW": [
        "model.language={name: nano, quantization: nf4, double_quantization: false}",
        "model.vision.quantization=nf4",
        "train.precision=bf16",
        "train.optimizer=adamw_8bit",
    ],
    "DoRA in the tower and the bridge": [
        "trainable={perceiver: false, cross_attention: false, new_tokens: true}",
        "lora={vision: {r: 4}, perceiver: {r: 2}, cross_attention: {r: 4}, use_dora: true}",
    ],
    "a step inside the backward pass, in bf16": ["train.optimizer_in_backward=true", "trainable.dtype=bf16"],
    # 32-pixel images: four tiles and the whole
    "tiles with text tags, kto": [
        "data.tiles={max: 4, size: 16, tags: text}",
        "model.perceiver=null",
        "train.method=kto",
        LORA,
    ],
    "tiles, dpo": ["data.tiles={max: 4, size: 16}", "train.method=dpo", LORA],
    "dpo, nf4, LoRA, checkpointing": ["train.method=dpo", NF4, LORA, CHECKPOINTING],
    "grpo with a reference, LoRA, checkpointing": ["train.method=grpo", LORA, GRPO, CHECKPOINTING],
}


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, ["train.batch_size=8", "train.max_steps=3", *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Data for each method: a hundred samples with the same text and two images each.

    All images differ, because the tower encodes equal ones once.
    """
    folder = QUICKSTART.parent / "quickstart"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    images = list(dict.fromkeys(image for row in rows for image in row["images"]))
    row = next(row for row in rows if len(row["images"]) == 2)
    alike = [row | {"images": images[2 * index : 2 * index + 2]} for index in range(100)]
    *prompt, answer = row["messages"]
    pairs = [
        {"prompt": prompt, "chosen": [answer], "rejected": "No one can tell.", "images": one["images"]}
        for one in alike
    ]
    path = tmp_path_factory.mktemp("data")
    labelled = [
        {"prompt": prompt, "completion": [answer], "label": index % 2 == 0, "images": one["images"]}
        for index, one in enumerate(alike)
    ]
    files = {"sft": alike, "dpo": pairs, "kto": labelled, "grpo": alike}
    for method, rows in files.items():
        (path / f"{method}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {method: f"data.train=[{{path: {path}/{method}.jsonl, image_root: {folder}}}]" for method in files}


# --- against a real step ---


def all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the scales that bitsandbytes keeps beside its matrices."""
    yield from chain(model.parameters(), model.buffers())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        outer = getattr(state, "state2", None)
        scales = [
            getattr(state, "absmax", None),
            getattr(state, "code", None),
            getattr(state, "offset", None),
        ]
        scales += [getattr(outer, "absmax", None), getattr(outer, "code", None)]
        scales += [getattr(owner, "SCB", None) for owner in (weight, getattr(module, "state", None))]
        yield from (tensor for tensor in scales if isinstance(tensor, Tensor))


COMMON_CASES = ("defaults", "nf4, LoRA alone, checkpointing")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(case, id=name) if name in COMMON_CASES else slow(case, id=name)
        for name, case in CASES.items()
    ],
)
def test_the_planned_peak_and_weights_are_those_of_a_real_run(tmp_path, data, overrides, monkeypatch):

    label_positions = LabelPositions.of
    monkeypatch.setattr(LabelPositions, "of", lambda labels: label_positions(labels.clamp(min=0)))  # all
    method = next((text[13:] for text in overrides if text.startswith("train.method=")), "sft")
    recipe = quickstart(data[method], f"train.output_dir={tmp_path}", *overrides)
    model, processor = build_model(recipe)
    plan = plan_memory(recipe, device="cpu")
    assert plan.trainable_parameters == sum(p.numel() for p in trainable_parameters(model).values())
    assert (plan.batch.images, plan.batch.where_from) == (2, "the longest of the data")
    trainer = make_trainer(model, processor, open_data(recipe.data, 0), recipe, [])
    if method == "grpo":  # sampled answers of the greatest length, as the plan has them
        trainer.generation_config.min_new_tokens = recipe.train.grpo.max_completion_tokens
    with MemoryTracker() as tracker:
        weights = tracker.track(all_tensors(model))
        weights += tracker.track(all_tensors(trainer.ref_model)) if recipe.train.has_reference else 0
        tracker.reset_peak()
        trainer.train()
    assert plan.step.weights == weights
    assert plan.peak == pytest.approx(tracker.peak, rel=0.02)


# --- laws of the plan ---


@cache
def planned(*overrides: str, device: str = "cuda") -> Plan:
    return plan_memory(quickstart(*overrides), device=device, text_tokens=40, images=1)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_larger_batch_never_needs_less(device):
    peaks = [planned(f"train.batch_size={size}", device=device).peak for size in (1, 2, 4)]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize(
    "overrides",
    [[], slow([LORA, "model.language.quantization=int8"])],
)
@pytest.mark.parametrize("device", [slow("cpu"), "cuda"])
def test_checkpointing_never_needs_more(device, overrides):
    without = planned(*overrides, device=device)
    assert planned("train.gradient_checkpointing=true", *overrides, device=device).peak <= without.peak


@pytest.mark.parametrize(
    "override",
    [
        "train.optimizer=adamw_8bit",
        slow("train.optimizer_in_backward=true"),
        slow("train.activation_offload=true"),
    ],
)
def test_a_memory_switch_never_needs_more(override):
    assert planned(override).peak <= planned().peak


def test_the_parts_of_a_plan_add_up_to_its_peak():
    plan = planned("lora.language={r: 8}", "model.language.quantization=nf4")
    step = plan.step
    assert step.weights + step.optimizer + step.gradients_at_peak + plan.activations == plan.peak
    assert sum(part.frozen + part.trainable for part in plan.components) == pytest.approx(
        step.weights, rel=0.05
    )


def test_paged_optimizer_state_does_not_count_as_gpu_memory():
    wide = "model.cross_attention={heads: 16, dim_head: 64}"  # the nano matrices are too small to be paged
    pinned, paged = (planned(wide, f"train.optimizer={name}") for name in ("adamw_8bit", "paged_adamw_8bit"))
    assert paged.step.paged > 0 and pinned.step.paged == 0
    assert paged.step.optimizer < pinned.step.optimizer


# --- the batch ---


def batch_of(recipe: Recipe) -> Batch:
    files = backbone_files(recipe.model)
    processor = files.processor()
    apply_template(processor, recipe.data)
    limit = text_limit(files.language, recipe.data.max_text_tokens)
    return longest_batch(recipe, processor, image_size=32, limit=limit, sizes={})


def test_sample_length_is_read_from_the_data():
    batch = batch_of(quickstart())
    assert (batch.text_tokens, batch.images, batch.where_from) == (42, 2, "the longest of the data")


def test_the_longest_sample_is_found_where_fewer_characters_are_more_tokens(tmp_path):
    question = "Where is it, and how far is that from the middle of the picture?"
    words = [f"At the left, and not far from the middle, {number}." for number in range(300)]
    numbers = "1029384756, 5647382910, 1234567890."
    rows = [{"question": question, "answer": answer} for answer in (*words, numbers)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = quickstart(f"data.train=[{{path: {tmp_path / 'x.jsonl'}}}]", "data.eval=[]")
    processor = backbone_files(recipe.model).processor()
    apply_template(processor, recipe.data)
    data = open_data(recipe.data, 0)
    lengths = [len(encode(processor, sample).input_ids) for sample in data.samples(data.train)]
    assert lengths.index(max(lengths)) == 300 and len(words[0]) > len(numbers)
    assert batch_of(recipe).text_tokens == max(lengths)


@pytest.mark.slow
def test_packed_rows_are_planned_at_full_length_with_all_their_images():
    packing = ("data.packing=true", "data.max_text_tokens=200", "train.batch_size=4")
    batch = batch_of(quickstart(*packing))
    assert batch.text_tokens == 200 and batch.where_from == "rows packed of the first 256 samples"
    recipe = quickstart(*packing)
    model, processor = build_model(recipe)
    batches = first_batches(open_data(recipe.data, 0), recipe, model, processor)
    largest = max(inputs["pixel_values"].shape[1] for inputs in batches)
    assert abs(batch.images - largest) <= 2  # the plan packs its samples into other rows than the run


def test_frames_of_videos_are_planned_as_images(tmp_path):
    frames = [[str(tmp_path / "a.png")] * count for count in (3, 12)]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [{"question": "What?", "answer": "It.", "videos": frames}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = batch_of(quickstart(f"data.train=[{{path: {tmp_path}/rows.jsonl}}]"))
    assert batch.images == 3 + 8


def test_without_data_the_limit_is_planned(tmp_path):
    source = f"data.train=[{{path: {tmp_path}/none.jsonl}}]"
    recipe = load_recipe(QUICKSTART, [source, "data.max_text_tokens=20"], require=())
    batch = batch_of(recipe)
    assert (batch.text_tokens, batch.images, batch.where_from) == (20, 1, "the limit")


# --- sizes in the paper ---


def recipe_without_weights(folder: Path, language: PreTrainedConfig, every: int) -> Recipe:
    """A recipe over a ViT-L/14 and a language model, of which ``folder`` has no weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((NANO_FOLDER / name).read_bytes())
    language.architectures = [f"{type(language).__name__.removesuffix('Config')}ForCausalLM"]
    language.save_pretrained(folder)
    return Recipe.model_validate(
        {
            "model": {
                "vision": {"name": "ViT-L-14"},
                "language": {"name": str(folder), "quantization": "nf4"},
                "cross_attn_every_n_layers": every,
                "perceiver": RELEASED_PERCEIVER.model_dump(),
            },
            "data": {"train": [{"path": folder / "none.jsonl"}]},
            "train": {
                "output_dir": folder / "run",
                "max_steps": 1,
                "batch_size": 1,
                "gradient_checkpointing": True,
            },
        }
    )


def mpt(width: int, layers: int) -> MptConfig:
    return MptConfig(d_model=width, n_layers=layers, n_heads=width // 128, vocab_size=50432, dtype="bfloat16")


REDPAJAMA = {
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
}
SHAPES = {
    "3B": (mpt(2048, 24), 1, 944),
    "4B": (GPTNeoXConfig(**REDPAJAMA, vocab_size=50432, dtype="bfloat16"), 2, 961),
    "9B": (mpt(4096, 32), 4, 1179),
}


@pytest.mark.parametrize("config, every, millions", SHAPES.values(), ids=SHAPES)
def test_open_flamingos_bridges_have_the_sizes_it_reports(tmp_path, config, every, millions):
    recipe = recipe_without_weights(tmp_path, config, every)
    files = backbone_files(recipe.model)
    model, _ = build_meta_model(recipe, files.tower, files.language, files.tokenizer, "cuda")
    perceiver, cross_attention = (
        sum(parameter.numel() for parameter in model.get_submodule(part.module).parameters())
        for part in (PERCEIVER, CROSS_ATTENTION)
    )
    assert perceiver == 63_019_008
    assert round((perceiver + cross_attention) / 1e6) == millions


# --- suggestions ---


@pytest.mark.slow
def test_a_suggested_saving_is_what_a_new_plan_saves(monkeypatch):
    recipe, sizes = quickstart(), {"text_tokens": 40, "images": 1}
    planner = Planner(recipe, "cuda", **sizes)
    before = planner.plan(recipe)
    needed = Gpu("too small", 0).needed(before)
    small = Gpu("small", (needed - 0.6 * before.peak) / GIB)  # so much must be saved
    monkeypatch.setattr("flamingo_ft.plan.plan_report.GPUS", (small,))
    changes = suggest_changes(planner, before)
    assert len(changes) > 1 and all(change.saved > 0 for change in changes)
    for change in changes:
        assert not small.fits(before)
        recipe = with_values(recipe, change.values)
        after = plan_memory(recipe, **sizes)
        assert before.peak - after.peak == change.saved and after.peak == change.plan.peak
        before = after
    assert small.fits(before)


@pytest.mark.slow
def test_a_run_that_fits_every_gpu_gets_no_suggestions():
    planner = Planner(quickstart(), "cuda", text_tokens=16, images=1)
    assert suggest_changes(planner, planner.plan(planner.recipe)) == []


# --- the command ---


def test_the_command_prints_tables_or_the_same_as_json(capsys):
    command = ["plan", str(QUICKSTART), "train.batch_size=2", "--text-tokens", "16", "--images", "1"]
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "perceiver" in output and "peak" in output and "H200" in output
    assert cli.main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["cuda"]["peak"] > 0 and record["gpus"][0]["fits"]
    assert torch.cuda.is_available() or record["cpu"]["peak"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_large_batch_is_planned_from_two_smaller_ones(device, monkeypatch):
    sizes = {"text_tokens": 42, "images": 2}
    large = quickstart("train.batch_size=48")
    direct = plan_memory(large, device=device, **sizes).peak
    monkeypatch.setattr("flamingo_ft.plan.planner.MAX_POSITIONS", 42 * 16)
    assert plan_memory(large, device=device, **sizes).peak == pytest.approx(direct, rel=1e-3)


def test_a_batch_of_millions_is_planned_in_seconds(monkeypatch):
    monkeypatch.setattr("flamingo_ft.plan.planner.MAX_POSITIONS", 42 * 16)
    huge = planned("train.batch_size=5000000")
    assert huge.batch.samples == 5_000_000 and huge.peak > 10**12


@pytest.mark.slow
def test_waiting_micro_batches_are_counted_without_being_built():
    steps = (2, 3, 1_000_000)
    two, three, many = (planned(f"train.gradient_accumulation_steps={count}").peak for count in steps)
    assert many - three == (three - two) * (1_000_000 - 3)
