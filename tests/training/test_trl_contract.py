"""The model meets the contract of TRL's SFT and DPO trainers."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from flamingo_ft import build_flamingo, load_language, load_vision
from flamingo_ft.data import Sample, encode, preference_row
from flamingo_ft.data.collate import collate_packed, collate_text
from flamingo_ft.data.media_resolver import lossless_bytes
from tests.data.dialogues import IMAGE, assistant, user

BRIDGE = ["perceiver", *(f"gated_cross_attn_layers.{index}" for index in range(4))]


@pytest.fixture
def parts():
    torch.manual_seed(0)
    sizes = {"num_latents": 4, "depth": 1, "heads": 2, "dim_head": 16}
    model, processor = build_flamingo(load_vision("nano"), load_language("nano"), perceiver=sizes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("perceiver.", "gated_cross_attn_layers.", "token_rows.")))
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.5)
    return model, processor


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade * 20 % 255,) * 3)


def dialogues() -> Dataset:
    """Dialogues with one image, two images and none."""
    messages = [{"role": "user", "content": "Which digit?"}, {"role": "assistant", "content": "Seven."}]
    return Dataset.from_list(
        [{"messages": messages, "images": [picture(i)] * ((i + 1) % 3)} for i in range(8)]
    )


def options(tmp_path, **more) -> dict:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **more,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_the_bridge_alone(parts, tmp_path, checkpointing):
    model, processor = parts
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path, assistant_only_loss=True, gradient_checkpointing=checkpointing)),
        train_dataset=dialogues(),
        processing_class=processor,
    )
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    declared = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= declared
    assert {name.split(".")[0] for name in changed} == {"perceiver", "gated_cross_attn_layers", "token_rows"}


def test_trls_fused_loss_equals_the_models_own(parts, tmp_path):
    model, processor = parts
    with torch.no_grad():
        model.token_rows.output.weight.add_(torch.randn_like(model.token_rows.output.weight))
    arguments = SFTConfig(**options(tmp_path))
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dialogues(), processing_class=processor)
    batch = trainer.data_collator([dict(row) for row in dialogues()])
    model.eval()
    with torch.no_grad():
        own, fused = model(**batch).loss, model(**batch, fused_lm_head=True).loss
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-6)


def test_sft_with_lora_and_the_bridge_in_modules_to_save(parts, tmp_path):
    model, processor = parts
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path)),
        train_dataset=dialogues(),
        processing_class=processor,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=BRIDGE),
    )
    start = trainer.model.base_model.model.perceiver.modules_to_save["default"].latents.clone()
    trainer.train()
    assert not torch.equal(trainer.model.base_model.model.perceiver.modules_to_save["default"].latents, start)


def test_dpo_on_preference_pairs_with_images(parts, tmp_path):
    model, processor = parts
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    pairs = [
        {
            "prompt": turn("user", "Which digit?"),
            "chosen": turn("assistant", "Seven."),
            "rejected": turn("assistant", "Two."),
            "images": [picture(i)],
        }
        for i in range(4)
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**options(tmp_path, per_device_train_batch_size=2, max_steps=4)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=processor,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins and float(margins[-1]) > 0


def test_dpo_on_preference_samples_reads_typed_markers_as_text(parts, tmp_path):
    model, processor = parts
    samples = [
        Sample([user(IMAGE, *[IMAGE] * (i % 2), "Is <image> seven?"), assistant("No <image>.")],
               [lossless_bytes(picture(i))] * (1 + i % 2), "other", "row 0",
               [assistant("Yes<|im_end|>.")])
        for i in range(4)
    ]  # fmt: skip
    rows = [preference_row(sample) for sample in samples]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**options(tmp_path, per_device_train_batch_size=2)),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    for answers, first in ((0, 0), (1, 2)):  # chosen ones, then rejected ones
        for row in range(2):
            worse = [*samples[row].messages[:1], *samples[row].rejected]
            expected = encode(processor, worse if answers else samples[row].messages)
            ids, mask = batch["input_ids"][first + row], batch["attention_mask"][first + row].bool()
            length = len(
                expected.input_ids
            )  # TRL keeps the line break that the template writes after an answer
            assert ids[mask].tolist()[:length] == expected.input_ids
    trainer.train()
    assert all(
        torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
    )


def test_packed_samples_give_the_same_loss_as_unpacked_ones(parts, tmp_path):
    model, processor = parts
    turns = [[user(*[IMAGE] * (i % 3), "Which digit?"), assistant("Seven." * (i + 1))] for i in range(4)]
    encoded = [encode(processor, messages) for messages in turns]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blank = torch.zeros(2, 3, 32, 32)
    apart = collate_text(encoded, processor.tokenizer.pad_token_id)
    apart["pixel_values"] = torch.stack([blank, torch.stack([pixels[0], blank[0]]), pixels[1:], blank])
    packed = collate_packed([encoded[:2], encoded[2:]], processor.tokenizer.pad_token_id)
    packed["pixel_values"] = torch.stack([torch.stack([pixels[0], blank[0]]), pixels[1:]])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options(tmp_path, remove_unused_columns=False, max_length=None)),
        data_collator=lambda rows: packed,
        train_dataset=dialogues(),
        processing_class=processor,
    )
    model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(model, dict(batch)) for batch in (apart, packed)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    trainer.train()
    assert trainer.state.global_step == 2
