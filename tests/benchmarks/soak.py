"""Kill training runs at random and at chosen moments, resume them, and compare the weights bit by bit.

    python -m tests.benchmarks.soak [--kills 50] [--seed 0]

Every case runs once undisturbed. Then it runs again and is killed and resumed until it ends, and its adapter
is compared with the undisturbed one. Half of the kills come at a random time; the others come while a file is
half written: a checkpoint that is being written or removed, the final adapter, the answers or the metrics.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests import killing, regimes

BASE = ("train.max_steps=12", "train.save_steps=1", "train.save_total_limit=2", "train.warmup_steps=2")
EVALUATED = ("data.eval=[{path: train.jsonl}]", "eval={batch_size: 2, max_new_tokens: 4, steps: 5}")
DROPOUT = (regimes.LORA, "lora.lora_dropout=0.3")
CASES = {
    "bridge": (),
    "bridge and LoRA, dropout, accumulated, evaluated": (
        *DROPOUT,
        "train.gradient_accumulation_steps=2",
        *EVALUATED,
    ),
    "two workers, grouped by length": ("train.num_workers=2", "data.group_by_length=true"),
    "8-bit steps in the backward pass": ("train.optimizer=adamw_8bit", "train.optimizer_in_backward=true"),
    "the best kept, ended early": (
        *EVALUATED[:1],
        "eval={steps: 2, keep: best, patience: 2}",
        "train.learning_rate=0.5",
    ),
    "LoRA only on nf4": (
        *regimes.REGIMES["LoRA only"],
        *regimes.quantized("nf4", "LoRA only"),
        "lora.lora_dropout=0.3",
    ),
}
MOMENTS = {
    "checkpoint half written": ("run/checkpoints", ".step-*.partial"),
    "checkpoint half removed": ("run/checkpoints", ".step-*.removed"),
    "adapter half written": ("run", ".adapter_model.safetensors.partial"),
    "answers half written": ("run", ".predictions.jsonl.partial"),
    "metrics half written": ("run", ".metrics.json.partial"),
}
WEIGHTS = "run/adapter_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rng, kills, runs = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        cases = [prepare(Path(scratch) / str(number), case) for number, case in enumerate(CASES.values())]
        while kills.total() < args.kills:
            for (folder, arguments, seconds), name in zip(cases, CASES, strict=True):
                same = disturb(folder, arguments, seconds, rng, kills)
                runs[name, "the same" if same else "DIFFERENT"] += 1
                print(f"{kills.total():4d} kills; {name}: {'the same' if same else 'DIFFERENT'}", flush=True)
    report(kills, runs)


def prepare(folder: Path, overrides: tuple[str, ...]) -> tuple[Path, list[str], float]:
    """Run a case undisturbed; return its folder, the command that resumes it, and the seconds it took."""
    folder.mkdir()
    regimes.write_run(folder)
    here = Path.cwd()
    os.chdir(folder)
    regimes.write_start(folder / "start")
    os.chdir(here)
    arguments = ["train", "./recipe.yaml", *BASE, *overrides]
    start = time.monotonic()
    if code := killing.wait(killing.start(arguments, folder, folder / "log.txt")):
        raise SystemExit(f"{(folder / 'log.txt').read_text()}\nexit code {code}")
    seconds = time.monotonic() - start
    (folder / "run").rename(folder / "undisturbed")
    return folder, [*arguments, "--resume"], seconds


def disturb(folder: Path, arguments: list[str], seconds: float, rng: random.Random, kills: Counter) -> bool:
    """Kill and resume a run until it ends; return whether its adapter equals the undisturbed one."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    code = killing.KILLED
    while code == killing.KILLED:
        name = rng.choice(["anywhere"] * len(MOMENTS) + list(MOMENTS))
        moment = (
            killing.after(rng.uniform(0, seconds))
            if name == "anywhere"
            else during(folder, name, rng, seconds)
        )
        code = killing.kill_when(killing.start(arguments, folder, folder / "log.txt"), moment)
        kills[name] += code == killing.KILLED
    if code:
        raise SystemExit(f"{(folder / 'log.txt').read_text()}\nexit code {code}")
    kept = (folder / "undisturbed" / "adapter_model.safetensors").read_bytes()
    return (folder / WEIGHTS).read_bytes() == kept


def during(folder: Path, name: str, rng: random.Random, seconds: float):
    """Return a condition that holds at the moment of that name, after a random part of the run."""
    place, pattern = MOMENTS[name]
    is_late, is_there = (
        killing.after(rng.uniform(0, 0.8 * seconds)),
        killing.file_there(folder / place, pattern),
    )
    return lambda: is_late() and is_there()


def report(kills: Counter, runs: Counter) -> None:
    for name, count in kills.most_common():
        print(f"killed {count} times: {name}")
    for (name, result), count in sorted(runs.items()):
        print(f"{count} runs {result}: {name}")
    different = sum(count for (_, result), count in runs.items() if result != "the same")
    print(f"{kills.total()} kills, {runs.total()} runs, {different} of them not the same to the last bit")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
