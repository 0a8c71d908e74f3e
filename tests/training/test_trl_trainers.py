"""TRL's unmodified trainers on a Flamingo change the trainable parameters and nothing else."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from flamingo_ft.model import FlamingoConfig
from flamingo_ft.model.tiles import Tiling

from .test_trl_contract import dialogues, options, parts, picture  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINED = ("perceiver", "gated_cross_attn_layers", "token_rows")


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def samples(**columns) -> Dataset:
    """Return four questions about an image each, with further columns."""
    rows = [{"prompt": turn("user", "Which digit?"), "images": [picture(i)], **columns} for i in range(4)]
    return Dataset.from_list(rows)


PAIRS = {"chosen": turn("assistant", "Seven."), "rejected": turn("assistant", "Two.")}


class OwnCollator:
    """A user's own collator: loss on every token but images and padding."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [
            self.processor.image_token * len(row["images"]) + row["messages"][0]["content"] for row in rows
        ]
        images = [row["images"] for row in rows]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        skipped = (batch["input_ids"] == self.processor.image_token_id) | (batch["attention_mask"] == 0)
        return {**batch, "labels": batch["input_ids"].masked_fill(skipped, -100)}


def sft(model, processor, folder):
    arguments = SFTConfig(
        **options(folder, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    )
    return SFTTrainer(model, arguments, OwnCollator(processor), dialogues(), processing_class=processor)


def dpo(model, processor, folder, **more):
    arguments = DPOConfig(**options(folder, per_device_train_batch_size=2, **more))
    return DPOTrainer(
        model, frozen(model), arguments, train_dataset=samples(**PAIRS), processing_class=processor
    )


def mpo(model, processor, folder):
    losses = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    return dpo(model, processor, folder, **losses)


def kto(model, processor, folder):
    rows = Dataset.from_list(
        [
            {**row, "completion": turn("assistant", "Seven."), "label": i % 2 == 0}
            for i, row in enumerate(samples())
        ]
    )
    arguments = KTOConfig(**options(folder, per_device_train_batch_size=2))
    return KTOTrainer(model, frozen(model), arguments, train_dataset=rows, processing_class=processor)


def grpo(model, processor, folder):
    arguments = GRPOConfig(**options(folder, num_generations=2, max_completion_length=4, max_steps=1))

    def reward(completions: list, **_) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]

    return GRPOTrainer(model, reward, arguments, samples(), processing_class=processor)


def frozen(model):
    return copy.deepcopy(model).requires_grad_(False)


@pytest.mark.parametrize(
    "make", [sft, grpo, *(pytest.param(make, marks=pytest.mark.slow) for make in (dpo, mpo, kto))]
)
def test_trl_trainers_change_only_trainable_parameters(parts, tmp_path, make):  # noqa: F811
    model, processor = parts
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make(model, processor, tmp_path)
    trainer.train()
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert trainer.state.global_step == trainer.args.max_steps and all(
        map(torch.isfinite, map(torch.tensor, losses))
    )
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in changed} == set(TRAINED)


def test_grpo_never_samples_the_image_token(parts, tmp_path):  # noqa: F811
    model, processor = parts
    trainer = grpo(model, processor, tmp_path)
    assert trainer.generation_config.suppress_tokens == [processor.image_token_id]


def test_the_configuration_has_the_usual_names_for_the_image_token(tmp_path):
    config = FlamingoConfig(media_token_id=58)
    assert config.image_token_id == config.image_token_index == 58
    config.image_token_id = 57
    assert config.media_token_id == 57 and FlamingoConfig(image_token_id=56).media_token_id == 56
    stored = config.to_dict()
    assert stored["media_token_id"] == 57 and "image_token_id" not in stored
    config.save_pretrained(tmp_path)
    assert FlamingoConfig.from_pretrained(tmp_path).image_token_id == 57


@pytest.mark.parametrize("make", [sft, *(pytest.param(make, marks=pytest.mark.slow) for make in (dpo, kto))])
def test_trl_trainers_take_images_in_tiles(parts, tmp_path, make):  # noqa: F811
    model, processor = parts
    processor.image_processor.tiles = Tiling(4, tile_pixels=16).to_dict()
    grids = set()
    model.perceiver.register_forward_pre_hook(lambda _, args: grids.add((args[0].shape[2], args[2])))
    trainer = make(model, processor, tmp_path)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert grids == {(5, (2, 2))}  # four tiles and the whole image
