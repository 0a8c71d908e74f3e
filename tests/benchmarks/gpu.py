"""Speed and memory of training OpenFlamingo's shapes on a GPU: `python -m tests.benchmarks.gpu`.

For each shape, format of both backbones and regime, with and without checkpointing, and without logits at
label positions alone: tokens and images per second, the share of this GPU's own rate of bf16 products, and
the peak of allocated memory. Weights are random, so nothing is downloaded. Each case runs in a process of its
own; one that does not fit is a row that says so. `--t4` computes in float16 and allows 16 GB. Without a GPU
it runs the shape `scaled`, to try the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from flamingo_ft.config import Recipe, load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.training.build import make_trainer

from .training_memory import ON_CPU, build, write_recipe

SHAPES = ("openflamingo-3b", "openflamingo-4b", "openflamingo-9b")
FORMATS = ("none", "int8", "nf4")
SMALL = ("train.optimizer=paged_adamw_8bit", "trainable.dtype=bf16")
NO_BRIDGE = "trainable={perceiver: false, cross_attention: false, new_tokens: false, dtype: bf16}"
REGIMES = {
    "bridge": SMALL,
    "bridge and LoRA": (*SMALL, "lora.language={r: 16}"),
    "LoRA only": (SMALL[0], NO_BRIDGE, "lora.language={r: 16}", "model.init_from=."),
}
T4 = ("train.precision=fp16", "trainable.dtype=fp32")
T4_BYTES = 16_000_000_000
WARM_UP, STEPS = 3, 5
PRODUCT_SIZE, PRODUCTS = 8192, 20


class StepTimes(TrainerCallback):
    """When each step ended, with everything that it put on the GPU."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure(recipe: Recipe, device: str) -> dict[str, float]:
    """Train some steps; return the median seconds of one, its operations and the peak of allocated bytes."""
    model, processor = build(recipe, device)
    times = StepTimes()
    trainer = make_trainer(model, processor, open_data(recipe.data, recipe.train.seed), recipe, [times])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = [
        after - before for before, after in zip(times.ends[WARM_UP:], times.ends[WARM_UP + 1 :], strict=False)
    ]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"seconds": sorted(steps)[len(steps) // 2], "operations": _operations(trainer), "peak": peak}


def _operations(trainer: Any) -> int:
    """Return the operations of the products of a step's forward and backward pass."""
    inputs = trainer.prepare_inputs(next(iter(trainer.batches)))
    with FlopCounterMode(display=False) as counter, trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, inputs).backward()
    return counter.get_total_flops()


def product_rate(device: str) -> float:
    """Return the operations per second of a bf16 product of two large matrices."""
    size = PRODUCT_SIZE if device == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds)[PRODUCTS // 2]


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what varies."""
    for shape, form, regime, checkpointing in product(
        arguments.shapes, arguments.formats, REGIMES, (False, True)
    ):
        yield {"shape": shape, "format": form, "regime": regime, "checkpointing": checkpointing}


def overrides(case: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return the overrides of a case's recipe."""
    backbones = [f"model.{part}.quantization={case['format']}" for part in ("vision", "language")]
    on_cpu = [] if torch.cuda.is_available() else ON_CPU
    return [
        *REGIMES[case["regime"]], *backbones, *(T4 if arguments.t4 else ()), *on_cpu,
        f"train.gradient_checkpointing={str(case['checkpointing']).lower()}",
        f"train.batch_size={arguments.batch_size}", f"train.max_steps={WARM_UP + STEPS + 1}",
    ]  # fmt: skip


def run_case(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """Measure a case in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.t4 and device == "cuda":
        torch.cuda.set_per_process_memory_fraction(T4_BYTES / torch.cuda.mem_get_info()[1])
    with tempfile.TemporaryDirectory() as folder:
        path = write_recipe(Path(folder), case["shape"], arguments.text_tokens, images=1)
        return measure(load_recipe(path, overrides(case, arguments)), device)


def in_own_process(case: dict[str, Any]) -> dict[str, float] | None:
    """Measure a case in a process of its own; None if it does not fit."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *sys.argv[1:], "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "out of memory" in done.stderr.lower():
        return None
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES if on_gpu else ("scaled",))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--t4", action="store_true", help="float16, and 16 GB at most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        try:
            print(json.dumps(run_case(arguments.case, arguments)))
        except UserError as error:
            raise SystemExit(str(error)) from None
        return
    rate, rows = product_rate("cuda" if on_gpu else "cpu"), []
    print(torch.cuda.get_device_name() if on_gpu else "CPU", f"{rate / 1e12:.1f} TFLOP/s in bf16")
    for case in cases(arguments):
        found = in_own_process(case)
        rows.append({**case, **(found or {})})
        name = " · ".join(
            f"{key} {value}" if key == "checkpointing" else str(value) for key, value in case.items()
        )
        if found is None:
            print(f"{name}: out of memory", flush=True)
            continue
        samples = arguments.batch_size / found["seconds"]
        share = found["operations"] / found["seconds"] / rate
        print(
            f"{name}: {samples * arguments.text_tokens:,.0f} tokens/s, {samples:.2f} images/s, "
            f"{share:.0%} of the product rate, {found['peak'] / 2**30:.2f} GiB",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rate": rate, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
