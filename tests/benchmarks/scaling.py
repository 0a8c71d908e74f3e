"""How the time of a training step grows: `python -m tests.benchmarks.scaling`.

With images, text and batch, one at a time, and for five families of language models of 6 layers of width 512;
ViT-B-32, cross-attention before every layer, random weights, the pixels of distinct images. Prints medians of
seconds, and how many times the seconds of the row before each takes; writes them to `--json`, and draws them
to `--figure`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import Gemma3TextConfig, GPTNeoXConfig, OPTConfig, PreTrainedConfig, Qwen3Config

from .peer_models import LLAMA, Ours, make_batch

IMAGES, TOKENS, SAMPLES = (1, 2, 4, 8, 16, 32), (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32, 64)
BASE = {"images": 1, "tokens": 256, "samples": 1}
SIZE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "Llama": LLAMA,
    "Qwen3": Qwen3Config(**SIZE, intermediate_size=1408, num_key_value_heads=8, head_dim=64),
    "Gemma 3": Gemma3TextConfig(**SIZE, intermediate_size=1408, num_key_value_heads=8, head_dim=64),
    "OPT": OPTConfig(**SIZE, ffn_dim=2048, word_embed_proj_dim=512),
    "GPT-NeoX": GPTNeoXConfig(**SIZE, intermediate_size=2048),
}


def seconds_of_a_step(ours: Ours, repeats: int, images: int, tokens: int, samples: int) -> float:
    """Return the median over ``repeats`` steps, after one that is not measured."""
    batch = make_batch(samples, images, tokens, ours.model.config.media_token_id)
    ours.step(batch)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ours.step(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(folder: Path, precision: str, repeats: int) -> Iterator[tuple[str, Any, float]]:
    """Yield what varies, its value, and the seconds of a step."""
    ours = Ours.build(folder, precision)
    for name, values in (("images", IMAGES), ("tokens", TOKENS), ("samples", SAMPLES)):
        for value in values:
            yield name, value, seconds_of_a_step(ours, repeats, **{**BASE, name: value})
    for family, config in FAMILIES.items():
        yield "family", family, seconds_of_a_step(Ours.build(folder, precision, config), repeats, **BASE)


def draw(rows: list[tuple[str, Any, float]], path: Path) -> None:
    """Write the figure: a panel for each of images, tokens and samples, both axes logarithmic."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("images", "tokens", "samples"), strict=True):
        values, seconds = zip(*((value, took) for kind, value, took in rows if kind == name), strict=True)
        axes.plot(values, seconds, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(values, map(str, values))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel({"images": "images in a sample", "samples": "samples in a batch"}.get(name, name))
        axes.set_ylabel("seconds of a step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    rows: list[tuple[str, Any, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), arguments.precision, arguments.repeats):
            before = rows[-1] if rows else row
            growth = "" if before[0] != row[0] or row[0] == "family" else f", {row[2] / before[2]:.2f} times"
            print(f"{row[0]:8} {row[1]!s:10} {row[2]:8.3f} s{growth}", flush=True)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
