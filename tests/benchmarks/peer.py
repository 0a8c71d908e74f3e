"""Training steps, generation and memory beside open-flamingo 2.0.1: `python -m tests.benchmarks.peer`.

    pip install --no-deps open-flamingo==2.0.1 einops einops-exts

Both models have the same weights (a LLaMA of 6 layers of width 512, ViT-B-32, all random, cross-attention
before every layer) and get the same batches in turn; losses and generated tokens must be equal in float32.

step: forward, loss, backward and AdamW as this package's trainer and as open-flamingo's training loop do
them, with the pixels of distinct images, and with the tower's tokens cached as in later epochs, which
open-flamingo does not have. share: of the rate at which this machine multiplies large matrices in that dtype,
by the products of the step.
generate: 32 new tokens after a text with 1 to 32 images, beside open-flamingo and the language model alone.
memory: what a step adds to the resident memory of a process at its peak, each model in a process of its own.

Prints medians and ratios, writes them to `--json`, and draws them to `--figure`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from .peer_figure import draw
from .peer_models import BF16, Ours, Peer, in_bf16_for_answers, make_batch

NEW_TOKENS = 32
LOSS_TOLERANCE = 1e-4
PRODUCT_SIZE, PRODUCTS = 2048, 20
PEER = "open-flamingo"


def alternate(repeats: int, runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Call each of ``runs`` in turn, the first round unmeasured; return median seconds, and last results."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    results = {name: run() for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(one) for name, one in times.items()}, results


def product_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a product of two large matrices."""
    matrix = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(dtype)
    seconds, _ = alternate(PRODUCTS, {"product": lambda: matrix @ matrix})
    return 2 * PRODUCT_SIZE**3 / seconds["product"]


def operations(run: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products, convolutions and attention in a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure_steps(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of images."""
    ours = {name: Ours.build(folder, name) for name in ("fp32", "bf16")}
    peer = Peer(ours["fp32"].model)
    rates = {"fp32": product_rate(torch.float32), "bf16": product_rate(BF16)}
    for images in arguments.images:
        batch = _batch(ours["fp32"], arguments.batch_size, images, arguments.tokens)
        peer.copy_bridge(ours["fp32"].model)
        losses = ours["fp32"].step(batch), peer.step(batch)
        assert abs(losses[0] - losses[1]) < LOSS_TOLERANCE * losses[1], losses
        runs: dict[str, Callable[[], float]] = {}
        counts = {}
        for name, one in ours.items():
            for epoch, inputs in (("first epoch", batch), ("later epochs", one.with_cached_tokens(batch))):
                runs[f"{epoch}, {name}"] = partial(one.step, inputs)
                counts[f"{epoch}, {name}"] = operations(runs[f"{epoch}, {name}"]) / rates[name]
        runs[PEER] = partial(peer.step, batch)
        runs[f"{PEER}, bf16"] = partial(peer.step, batch, autocast=True)
        seconds, _ = alternate(arguments.repeats, runs)
        share = {name: counts[name] / seconds[name] for name in counts}
        yield {"images": images, "seconds": seconds, "share": share}


def measure_generation(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of beams and images."""
    exact = Ours.build(folder)
    ours, peer = {"fp32": exact, "bf16": in_bf16_for_answers(exact)}, Peer(exact.model)
    alone = {name: one.language_model_alone() for name, one in ours.items()}
    for beams in (1, 3):
        for images in arguments.images:
            batch, options = _batch(exact, 1, images, 8 * images), _decoding(beams)
            runs: dict[str, Callable[[], Tensor]] = {}
            for name, one in ours.items():
                runs[name] = partial(one.generate, batch, **options)
                runs[f"language model alone, {name}"] = partial(_generate_text, alone[name], batch, **options)
            runs[PEER] = partial(peer.generate, batch, **options)
            seconds, tokens = alternate(arguments.repeats, runs)
            equal = bool(torch.equal(tokens["fp32"], tokens[PEER]))
            yield {"beams": beams, "images": images, "seconds": seconds, "equal": equal}


def _generate_text(lm: LlamaForCausalLM, batch: dict[str, Tensor], **options: Any) -> Tensor:
    ids = batch["input_ids"]
    return lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]


def _batch(ours: Ours, size: int, images: int, tokens: int) -> dict[str, Tensor]:
    return make_batch(size, images, tokens, ours.model.config.media_token_id)


def _decoding(beams: int) -> dict[str, Any]:
    tokens = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return {"num_beams": beams, "do_sample": False, "eos_token_id": 1, **tokens}


def measure_memory(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of images."""
    for images in arguments.images:
        mib = {side: _memory_of(side, images, arguments) for side in ("fp32", "bf16", PEER)}
        yield {"images": images, "MiB": mib}


def _memory_of(side: str, images: int, arguments: argparse.Namespace) -> float:
    command = [
        sys.executable, "-m", "tests.benchmarks.peer", "--only", side, "--images", str(images),
        "--batch-size", str(arguments.batch_size), "--tokens", str(arguments.tokens),
    ]  # fmt: skip
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory_of_a_step(side: str, images: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Print the MiB that two steps of one model add to the resident memory of this process."""
    ours = Ours.build(folder, "bf16" if side == "bf16" else "fp32")
    batch = _batch(ours, arguments.batch_size, images, arguments.tokens)
    step = ours.step
    if side == PEER:
        peer = Peer(ours.model)
        del ours, step
        step = peer.step
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step(batch), step(batch)
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """Return an entry of this process's status, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


PARTS = {"step": measure_steps, "generate": measure_generation, "memory": measure_memory}


def print_row(row: dict[str, Any]) -> None:
    """Print a row, with how many times as fast as the peer, or as the language model, each time is."""
    print(" · ".join(f"{name} {value}" for name, value in row.items() if not isinstance(value, dict)))
    for unit in ("seconds", "MiB"):
        for name, value in row.get(unit, {}).items():
            ratio = row[unit][PEER] / value
            share = f", {row['share'][name]:.0%} of the product rate" if name in row.get("share", {}) else ""
            print(f"  {name:32} {value:9.3f} {unit}, {ratio:.2f}x{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5, 17, 32])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--only", choices=("fp32", "bf16", PEER), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only:
            print_memory_of_a_step(arguments.only, arguments.images[0], arguments, folder)
            return
        record: dict[str, Any] = {
            "torch": torch.__version__, "machine": platform.processor(), "cores": os.cpu_count()
        }  # fmt: skip
        for part in arguments.parts or PARTS:
            record[part] = []
            for row in PARTS[part](folder, arguments):
                print_row(row)
                record[part].append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2))
    if arguments.figure:
        draw(record, arguments.figure)


if __name__ == "__main__":
    main()
