"""Small data of each training method about the images of the small run, and plain TRL trainers on them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from flamingo_ft.training.train import train
from tests import regimes

QUESTION = "Which shade?"
ANSWERS = ("Dark.", "Light, I say.")


def pair_rows() -> list[dict]:
    """A preference pair about each image."""
    return [
        {"prompt": QUESTION, "chosen": ANSWERS[i], "rejected": ANSWERS[1 - i], "images": [f"{i}.png"]}
        for i in range(2)
    ]


def labelled_rows() -> list[dict]:
    """A good and a bad answer about each image."""
    return [
        {"prompt": QUESTION, "completion": ANSWERS[i ^ wrong], "label": not wrong, "images": [f"{i}.png"]}
        for i in range(2)
        for wrong in range(2)
    ]


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("\n".join(map(json.dumps, rows)))


def for_trl(rows: list[dict]) -> Dataset:
    """Return rows as TRL's conversational ones, their images opened."""
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return Dataset.from_list(
        [
            {
                **{
                    key: [{"role": roles[key], "content": value}] if key in roles else value
                    for key, value in row.items()
                },
                "images": [Image.open(name).convert("RGB") for name in row["images"]],
            }
            for row in rows
        ]
    )


def reference_loss(make: Callable[..., Any], config: Any, rows: list[dict], *overrides: str) -> float:
    """Return the loss that TRL's unmodified trainer computes on ``rows`` with a shaken model."""
    model, processor = regimes.build(*overrides)
    reference = copy.deepcopy(model)
    regimes.shake(model, 0.3)
    trainer = make(model, reference, config, train_dataset=for_trl(rows), processing_class=processor)
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def resumed_and_whole(*overrides: str) -> tuple[bytes, bytes]:
    """Return the adapter of a run that was resumed in the middle, and of one that was not."""
    kept = (
        "train.max_steps=2",
        "train.save_steps=1",
        "train.save_total_limit=3",
        "train.checkpoint_dir=kept",
    )
    train(regimes.recipe(*overrides, *kept, "train.output_dir=whole"))
    shutil.rmtree("kept/step-2")
    lines: list[str] = []
    train(regimes.recipe(*overrides, *kept, "train.output_dir=resumed"), resume=True, log=lines.append)
    assert "step-1" in "".join(lines)
    resumed, whole = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("resumed", "whole"))
    return resumed, whole


def changed(trainer: Any) -> set[str]:
    """Train, and return the parameters that have changed."""
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
