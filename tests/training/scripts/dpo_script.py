"""DPO as in TRL's documentation, on a Flamingo: `python dpo_script.py QUICKSTART OUTPUT`.

QUICKSTART: the folder with train.jsonl and its images. Prints the reward margin of each step.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

import flamingo_ft

quickstart, output = Path(sys.argv[1]), sys.argv[2]

rows = [json.loads(line) for line in (quickstart / "train.jsonl").read_text(encoding="utf-8").splitlines()]
dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "Is it even or odd?"}],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "I cannot tell."}]}],
            "images": [Image.open(quickstart / row["images"][0])],
        }
        for row in rows
        if row["task"] == "even_or_odd"
    ][:32]
)

torch.manual_seed(0)
model, processor = flamingo_ft.build_flamingo(
    flamingo_ft.load_vision("nano"),
    flamingo_ft.load_language("nano"),
    perceiver={"num_latents": 8, "depth": 1, "heads": 4, "dim_head": 32},
    cross_attention={"heads": 4, "dim_head": 32},
)
reference = copy.deepcopy(model)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(not name.startswith(("vision_encoder.", "lang_encoder.")))

trainer = DPOTrainer(
    model=model,
    ref_model=reference,
    args=DPOConfig(
        output_dir=output,
        max_steps=12,
        per_device_train_batch_size=4,
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
print(
    json.dumps(
        [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    )
)
