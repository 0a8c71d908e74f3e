"""Every dataset schema and every kind of source trains a model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.config import Recipe
from flamingo_ft.data import open_data
from flamingo_ft.data.pairs import preference_row
from flamingo_ft.errors import UserError
from flamingo_ft.training.build import build_model, make_trainer
from tests.data.fixtures import FIXTURES
from tests.thinned import slow

STEPS = 6
PREFERENCES = [name for name in FIXTURES if name.startswith("preference")]


def recipe(entry: dict, folder: Path, **data) -> Recipe:
    small = {"heads": 2, "dim_head": 8}
    return Recipe.model_validate(
        {
            "model": {
                "vision": {"name": "nano"},
                "language": {"name": "nano"},
                "perceiver": {"num_latents": 3, "depth": 1, **small},
                "cross_attention": small,
            },
            "data": {"train": [entry], "video_frames": 2, **data},
            "train": {
                "output_dir": str(folder / "run"),
                "max_steps": STEPS,
                "batch_size": 3,
                "learning_rate": 3e-3,
                "learning_rates": {"gates": 3e-3},  # ten times that, the default, is rough on the first steps
                "lr_scheduler": "constant",
                "logging_steps": 1,
                "num_workers": 0,
            },
        }
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def parts():
    """Model, processor, and the initial weights for every test."""
    model, processor = build_model(recipe({"path": "none"}, Path()))
    return model, processor, {name: weight.clone() for name, weight in trainable_parameters(model).items()}


@pytest.fixture
def train(parts, tmp_path):
    """Return a function from a data entry to a trainer that has trained on it."""
    model, processor, start = parts

    def run(entry: dict, **data):
        config = recipe(entry, tmp_path, **data)
        with torch.no_grad():
            for name, weight in trainable_parameters(model).items():
                weight.copy_(start[name])
        trainer = make_trainer(model, processor, open_data(config.data, 0), config, [])
        trainer.train()
        return trainer

    return run


def losses_of(trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# Other storage formats for rows that another fixture trains on; tests/data reads all of them.
STORED_OTHERWISE = (
    "arrow",
    "imagefolder_classes",
    "imagefolder_csv",
    "json_object",
    "jsonl_base64",
    "jsonl_streamed",
    "messages_trl",
    "parquet_streamed",
    "saved_dataset",
    "tar_mmc4_files",
    "tsv_questions",
)
TRAINED = [name for name in FIXTURES if "preference" not in name]


@pytest.mark.parametrize("name", [slow(name) if name in STORED_OTHERWISE else name for name in TRAINED])
def test_the_loss_falls_and_no_row_is_skipped(name, train, tmp_path):
    trainer = train(FIXTURES[name](tmp_path))
    losses = losses_of(trainer)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    record = trainer.batches.stats.metrics()
    assert record["rows"] == 3 * STEPS and not record["skipped"] and not record["dropped"]


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_pairs_train_in_an_unmodified_dpo_trainer(name, tmp_path):
    config = recipe(FIXTURES[name](tmp_path), tmp_path)
    model, processor = build_model(config)
    data = open_data(config.data, 0)
    rows = [preference_row(sample) for sample in data.samples(data.train)]
    options = {
        "per_device_train_batch_size": len(rows),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    arguments = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **options,
    )
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora,
    )
    trainer.train()
    margins = [
        float(entry["rewards/margins"]) for entry in trainer.state.log_history if "rewards/margins" in entry
    ]
    assert margins[-1] > margins[0]


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_pairs_are_refused_by_sft(name, train, tmp_path):
    with pytest.raises(
        UserError, match="expected samples with one answer, got preference pairs; set train.method to dpo"
    ):
        train(FIXTURES[name](tmp_path))


@pytest.mark.parametrize("name", ["messages_two_images", "interleaved_mmc4", "frames"])
@pytest.mark.parametrize("way", [{"packing": True, "max_text_tokens": 60}, {"group_by_length": True}])
def test_packed_and_length_grouped_batches_train(name, way, train, tmp_path):
    losses = losses_of(train(FIXTURES[name](tmp_path), **way))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("video", "frames", "jsonl_base64")),
    ],
)
def test_the_feature_cache_gives_the_same_losses_cold_and_warm(name, train, tmp_path):
    cache = {"folder": str(tmp_path / "cache"), "dtype": "fp32"}
    entry = FIXTURES[name](tmp_path)
    plain, cold, warm = [losses_of(train(entry, cache=one)) for one in (None, cache, cache)]
    assert warm == cold
    torch.testing.assert_close(torch.tensor(cold), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    assert any((tmp_path / "cache").rglob("*.safetensors"))


def test_restored_batches_continue_with_the_same_samples(parts, tmp_path):
    model, processor, _ = parts
    config = recipe(FIXTURES["messages"](tmp_path), tmp_path)

    def batches():
        return make_trainer(model, processor, open_data(config.data, 0), config, []).batches

    expected = list(itertools.islice(batches(), 6))
    first, second = batches(), batches()
    resumed = list(itertools.islice(first, 2))
    second.load_state_dict(first.state_dict())
    resumed += itertools.islice(second, 4)
    for one, other in zip(expected, resumed, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
