"""Cost of the logits of all positions of a batch: `python -m tests.benchmarks.label_logits`.

Forward, loss and backward of one step with a random language model, a large vocabulary, long prompts and
short answers, in three variants: the model's own loss over all logits at once, TRL's fused head over every
position (as it works without a GPU), and the trainer's loss over the positions that predict a label. Prints
tokens per second, the peak bytes of live tensors besides the weights (counted operator by operator), and the
loss, which is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones.language import NANO_FOLDER, LanguageBackbone
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.model import build_flamingo
from flamingo_ft.plan.memory_tracker import MemoryTracker
from flamingo_ft.training.build import make_trainer
from flamingo_ft.training.trainer import FlamingoTrainer

MIB = 2**20
RECIPE = """\
model: {vision: {name: nano}, language: {name: nano}}
data: {train: [{path: train.jsonl}]}
train: {output_dir: run, max_steps: 1, batch_size: 4, num_workers: 0}
"""


def make(vocabulary: int, width: int, words: int) -> FlamingoTrainer:
    """Return a trainer in the current directory, on prompts of ``words`` words and answers of three."""
    Image.new("RGB", (32, 32)).save("blank.png")
    turns = [
        {"role": "user", "content": "<image>" + "digit " * words},
        {"role": "assistant", "content": "one or two"},
    ]
    Path("train.jsonl").write_text("\n".join([json.dumps({"messages": turns, "images": ["blank.png"]})] * 8))
    Path("recipe.yaml").write_text(RECIPE)
    recipe = load_recipe("./recipe.yaml")
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER)
    language = LanguageBackbone(lm, tokenizer, {"name": "random", "revision": None, "sha256": "random"})
    model, processor = build_flamingo(load_vision("nano"), language, cross_attn_every_n_layers=1)
    set_trainable(model, recipe.trainable)
    return make_trainer(model, processor, open_data(recipe.data, 0), recipe, [])


def losses(trainer: FlamingoTrainer, batch: dict) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the three losses by name."""
    model = trainer.model.train()
    return {
        "all logits at once": lambda: model(**batch, use_cache=False).loss,
        "fused, every position": lambda: SFTTrainer.compute_loss(trainer, model, dict(batch)),
        "label positions": lambda: trainer.compute_loss(model, dict(batch)),
    }


def measure(
    trainer: FlamingoTrainer, loss_of: Callable[[], torch.Tensor], steps: int
) -> tuple[float, int, float]:
    """Return the seconds of a step, its peak bytes of live tensors besides the weights, and the loss."""
    with MemoryTracker() as live:
        weights = live.track([*trainer.model.parameters(), *trainer.model.buffers()])
        loss_of().backward()
    trainer.model.zero_grad()
    start = time.perf_counter()
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        trainer.model.zero_grad()
    return (time.perf_counter() - start) / steps, live.peak - weights, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--words", type=int, default=250, help="of a prompt")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trainer = make(args.vocabulary, args.width, args.words)
        batch = next(iter(trainer.batches))
        tokens, labels = batch["input_ids"].numel(), int((batch["labels"][:, 1:] != -100).sum())
        print(
            f"{tokens} text tokens, {labels} of them learned, "
            f"vocabulary {args.vocabulary:,}, width {args.width}"
        )
        for name, loss_of in losses(trainer, batch).items():
            seconds, peak, loss = measure(trainer, loss_of, args.steps)
            print(f"{name:22} {tokens / seconds:9,.0f} tokens/s {peak / MIB:9,.0f} MiB   loss {loss:.5f}")


if __name__ == "__main__":
    main()
