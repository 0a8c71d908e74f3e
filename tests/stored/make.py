"""Write a run, its adapter, a composition and a merged model with the package on PYTHONPATH.

cd FOLDER && PYTHONPATH=CHECKOUT python make.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

COMMAND = [sys.executable, "-m", "flamingo_ft"]
STEPS, KILLED_AFTER = 4, 2
RECIPE = f"""\
# quickstart with a tiny bridge and LoRA, a few steps
model:
  vision: {{name: nano}}
  language: {{name: nano}}
  cross_attn_every_n_layers: 4
  perceiver: {{num_latents: 2, depth: 1, heads: 1, dim_head: 8, ff_mult: 1}}
  cross_attention: {{heads: 1, dim_head: 8, ff_mult: 1}}
lora:
  language: {{r: 2, lora_alpha: 4, target_modules: [q_proj]}}
  lora_dropout: 0.1
data:
  train: [{{path: train.jsonl}}]
train:
  output_dir: run
  max_steps: {STEPS}
  save_steps: {KILLED_AFTER}
  logging_steps: 1
  batch_size: 2
  learning_rate: 3.0e-2
  warmup_steps: 1
  num_workers: 0
"""
PLACE = "/FOLDER"  # stands for the folder of the run in what it recorded
DIGITS = (3, 8, 1, 6)
QUESTION = "Which digit is this?"


def write_data(folder: Path) -> None:
    """Write a few rows and their images: a bar whose position and background depend on the digit."""
    rows = []
    for digit in DIGITS:
        image = Image.new("L", (32, 32), 20 * digit)
        image.paste(255, (3 * digit, 4, 3 * digit + 4, 28))
        image.save(folder / f"{digit}.png")
        question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{digit}."}]
        rows.append({"messages": messages, "images": [f"{digit}.png"]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)


def losses(folder: Path) -> dict[str, float]:
    """Return the losses that a run logged, by step."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {str(entry["step"]): entry["loss"] for entry in entries if "loss" in entry}


@torch.no_grad()
def logits(model, processor, images: Path) -> torch.Tensor:
    """Return logits (vocabulary,) after a prompt with two images."""
    text = f"{processor.image_token} Which digit? {processor.image_token} And this? <|endofchunk|>"
    pictures = [Image.open(images / f"{digit}.png").convert("RGB") for digit in DIGITS[:2]]
    batch = processor(text=text, images=pictures, return_tensors="pt").to(model.device)
    return model(**batch).logits[0, -1].float().cpu()


@torch.no_grad()
def text_logits(model, processor) -> torch.Tensor:
    """Return logits (vocabulary without new tokens,) after text alone.

    A composition's rows of new tokens are random.
    """
    ids = processor.tokenizer("Which digit is it?", return_tensors="pt")["input_ids"]
    vocabulary = model.config.text_config.vocab_size - len(model.config.new_token_ids or ())
    return model(input_ids=ids).logits[0, -1, :vocabulary].float()


@torch.no_grad()
def answers(model, processor, images: Path) -> list[str]:
    """Return the first tokens of the greedy answer to the question about each image."""
    texts = []
    for digit in DIGITS:
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        text = processor.apply_chat_template([question], add_generation_prompt=True)
        picture = Image.open(images / f"{digit}.png").convert("RGB")
        batch = processor(text=text, images=[picture], return_tensors="pt").to(model.device)
        ids = model.generate(**batch, do_sample=False, max_new_tokens=8)
        texts.append(processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :]))
    return texts


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def relocate(folder: Path, old: str, new: str) -> None:
    """Replace a path in the text files of a run, and update the digests of its checkpoints."""
    for path in [*folder.rglob("*.yaml"), *folder.rglob("*.jsonl"), *folder.rglob("checkpoint.json")]:
        path.write_text(path.read_text().replace(old, new))
    for path in folder.rglob("checkpoint.json"):
        manifest = json.loads(path.read_text())
        for name, record in manifest["files"].items():
            content = (path.parent / name).read_bytes()
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    from flamingo_ft import FlamingoForConditionalGeneration, FlamingoProcessor
    from flamingo_ft.adapters import load_adapter, write_composition

    here = Path.cwd()
    write_data(here)
    subprocess.run([*COMMAND, "train", "./recipe.yaml"], check=True)
    expected = {"losses": losses(here / "run")}
    (here / "run").rename(here / "whole")
    process = subprocess.Popen([*COMMAND, "train", "./recipe.yaml"])
    while not (here / "run" / "checkpoints" / f"step-{KILLED_AFTER}").exists():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (here / "run" / "checkpoints" / f"step-{STEPS}").exists()

    leave_out = shutil.ignore_patterns("checkpoints", "tensorboard", "figures", "report.html")
    shutil.copytree(here / "whole", here / "adapter", ignore=leave_out)
    shutil.rmtree(here / "whole")
    write_composition(here / "adapter", here / "composition")
    subprocess.run([*COMMAND, "merge", "adapter", "merged"], check=True)

    logits_by_name = {}
    for name in ("adapter", "composition", "merged"):
        if name == "adapter":
            model, processor = load_adapter(here / name, device="cpu")
        else:
            model = FlamingoForConditionalGeneration.from_pretrained(here / name).eval()
            processor = FlamingoProcessor.from_pretrained(here / name)
        if name == "composition":
            logits_by_name[name] = text_logits(model, processor)
        else:
            logits_by_name[name] = logits(model, processor, here)
            expected[f"{name}_answers"] = answers(model, processor, here)
    save_file(logits_by_name, here / "logits.safetensors")

    # Most weights of the merged model are those of the nano backbones: store only their digests.
    merged = load_file(here / "merged" / "model.safetensors")
    expected["merged_sha256"] = {name: sha256(tensor) for name, tensor in sorted(merged.items())}
    expected["merged_files"] = sorted(path.name for path in (here / "merged").iterdir())
    folded = {name: tensor for name, tensor in merged.items() if name.endswith("q_proj.weight")}
    save_file(folded, here / "merged_with_lora.safetensors", {"format": "pt"})
    (here / "merged" / "model.safetensors").unlink()
    shutil.rmtree(here / "run" / "tensorboard", ignore_errors=True)
    for name in ("run", "adapter", "merged"):
        relocate(here / name, str(here), PLACE)
    (here / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
