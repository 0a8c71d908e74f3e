"""Record the losses of ten training steps through the command line, after an intended change of numerics.

Run `python -m tests.golden.record_loss_curves` in the root of the repository; it writes loss_curves.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from flamingo_ft import cli

FILE = Path(__file__).parent / "loss_curves.json"
RECIPES = Path(__file__).parents[2] / "recipes"
TEN_STEPS = (
    "train.max_steps=10", "train.batch_size=4", "train.logging_steps=1", "train.num_workers=0",
    "train.warmup_steps=5", "train.learning_rates.gates=3.0e-3", "train.optimizer=adamw",
    "train.precision=fp32", "data.eval=[]", "eval.before=false", "eval.shuffled_images=false",
)  # fmt: skip
CASES = {
    "bridge": ("quickstart",),
    "bridge and LoRA, nf4": ("bridge_lora",),
    "dpo": ("dpo", "model.init_from=null", "train.learning_rate=1.0e-3", "train.learning_rates.gates=1.0e-3"),
}


def losses_of(case: str, folder: Path) -> list[float]:
    """Train a packaged recipe in float32 on one thread, and return the loss of each step."""
    recipe, *overrides = CASES[case]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        status = cli.main(
            ["train", str(RECIPES / f"{recipe}.yaml"), *TEN_STEPS, *overrides, f"train.output_dir={folder}"]
        )
    finally:
        torch.set_num_threads(before)
    if status:
        raise RuntimeError(f"{case}: exit status {status}")
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        curves = {case: losses_of(case, Path(scratch, str(number))) for number, case in enumerate(CASES)}
    FILE.write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")
