"""How fast a new bridge learns to look, by setting: `python -m tests.benchmarks.new_bridge [SETTING ...]`.

Each setting is a packaged recipe with overrides, trained on the same number of samples from several seeds and
evaluated on the held-out ones. Prints a row per setting: the mean and the standard deviation over the seeds
of accuracy by task, of accuracy with the images of other samples, and of the image loss gap. `--with` adds
overrides to all of them, such as folders in place of backbones from the Hub.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flamingo_ft.config import load_recipe
from flamingo_ft.training.train import train

SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "AdamW": ("train.optimizer=adamw",),
    "OpenFlamingo's": (
        "train.optimizer=adamw",
        "train.learning_rate=1.0e-4",
        "train.learning_rates.gates=1.0e-4",
        "model.perceiver.depth=6",
        "model.cross_attn_every_n_layers=1",
    ),
    "perceiver of depth 6": ("model.perceiver.depth=6",),
    "perceiver of depth 2": ("model.perceiver.depth=2",),
    "perceiver of depth 2, AdamW": ("model.perceiver.depth=2", "train.optimizer=adamw"),
    "perceiver of depth 1, 16 latents": ("model.perceiver={depth: 1, num_latents: 16}",),
    "learning rate 1e-4": ("train.learning_rate=1.0e-4",),
    "learning rate 3e-3": ("train.learning_rate=3.0e-3",),
    "gates at the rate of their blocks": ("train.learning_rates.gates=1.0e-3",),
    "cross-attention before every layer": ("model.cross_attn_every_n_layers=1",),
    "cross-attention before every fifth layer": ("model.cross_attn_every_n_layers=5",),
    "LoRA too": ("lora.language={r: 16}",),
}
QUIET = ("eval.before=false", "eval.steps=null", "train.save_steps=null", "train.report_to=[]")


def results(name: str, overrides: Sequence[str], steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Train a packaged recipe from each seed and yield what the evaluation found."""
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            length = (f"train.max_steps={steps}", f"train.seed={seed}")
            values = (*QUIET, *length, *overrides, f"train.output_dir={Path(folder) / 'run'}")
            yield train(load_recipe(name, values))["eval"]


def row(evaluations: list[dict[str, Any]]) -> str:
    """Return the cells of a setting: accuracy with right and with swapped images by task, and the gap."""
    cells = []
    for task in evaluations[0]["per_task"]:
        scores = [evaluation["per_task"][task] for evaluation in evaluations]
        right, swapped = (
            _spread(100 * score[key] for score in scores) for key in ("accuracy", "shuffled_images")
        )
        cells.append(f"{task} {right} ({swapped})")
    gap = _spread((evaluation["image_loss_gap"]["value"] for evaluation in evaluations), digits=2)
    return " | ".join([*cells, gap])


def _spread(values: Iterable[float], digits: int = 1) -> str:
    values = [*values]
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--recipe", default="emoji")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--with", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.settings if name not in SETTINGS]:
        parser.error(f"no setting {unknown[0]!r}; use one of: {', '.join(SETTINGS)}")
    for setting in arguments.settings or SETTINGS:
        overrides = (*arguments.overrides, *SETTINGS[setting])
        scores = [*results(arguments.recipe, overrides, arguments.steps, arguments.seeds)]
        print(f"| {setting} | {row(scores)} |", flush=True)


if __name__ == "__main__":
    main()
