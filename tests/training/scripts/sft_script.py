"""SFT as in TRL's documentation, on a Flamingo: `python sft_script.py QUICKSTART OUTPUT`.

QUICKSTART: the folder with train.jsonl and its images. Prints the loss of each step.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

import flamingo_ft

quickstart, output = Path(sys.argv[1]), sys.argv[2]

rows = [json.loads(line) for line in (quickstart / "train.jsonl").read_text(encoding="utf-8").splitlines()]
dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "Which digit is this?"}],
            "completion": [{"role": "assistant", "content": row["messages"][1]["content"][0]["text"]}],
            "images": [Image.open(quickstart / row["images"][0])],
        }
        for row in rows
        if row["task"] == "which_digit"
    ][:64]
)

torch.manual_seed(0)
model, processor = flamingo_ft.build_flamingo(
    flamingo_ft.load_vision("nano"),
    flamingo_ft.load_language("nano"),
    perceiver={"num_latents": 8, "depth": 1, "heads": 4, "dim_head": 32},
    cross_attention={"heads": 4, "dim_head": 32},
)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(not name.startswith(("vision_encoder.", "lang_encoder.")))

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output,
        max_steps=24,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=dataset,
    processing_class=processor,
)
trainer.train()
print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
