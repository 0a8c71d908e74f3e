"""Peak memory of merging an adapter: `python -m tests.benchmarks.merging_memory`.

Makes a random sharded language model and an adapter with LoRA on it, in nf4, in a temporary folder, and
merges in a fresh process. Prints the peak growth of the process's own memory (RssAnon, never dropped)
while the model is merged, written, verified and evaluated, next to the sizes of the merged model and its
largest shard. Linux and CPU only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import flamingo_ft
from tests.benchmarks.loading_memory import MIB, PeakOfOwnMemory, make_language, status, warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of merging an adapter.")
    parser.add_argument(
        "--megabytes", type=int, default=800, help="of the language model's weights, in float32"
    )
    parser.add_argument("--shard", type=int, default=200, help="megabytes of a shard, read and written")
    parser.add_argument("--base", choices=("bf16", "dequantized"), default="bf16")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure), args.base, args.shard)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_language(Path(folder, "lm"), args.megabytes, args.shard)
        make_adapter(Path(folder))
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.merging_memory",
            *sys.argv[1:],
            "--measure",
            folder,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"merge {args.base}: own memory grew {result['grown']:.0f} MiB; "
        f"merged model {result['model']:.0f} + largest shard {result['largest']:.0f} MiB"
    )


def make_adapter(folder: Path) -> None:
    """Save an adapter with LoRA of a Flamingo around the language model in ``folder``, in nf4."""
    from flamingo_ft.adapters import add_lora, save_adapter
    from flamingo_ft.backbones.quantization import Quantization
    from flamingo_ft.config import LoraPart, LoraSection

    language = flamingo_ft.load_language(str(folder / "lm"), quantization=Quantization("nf4"))
    sizes = {"num_latents": 4, "depth": 1, "heads": 2, "dim_head": 16}
    model, processor = flamingo_ft.build_flamingo(
        flamingo_ft.load_vision("nano"), language, cross_attn_every_n_layers=4, perceiver=sizes
    )
    add_lora(model, LoraSection(language=LoraPart(r=8)))
    save_adapter(model, processor, folder / "adapter")


def measure(folder: Path, base: str, shard: int) -> dict[str, float]:
    """Merge, and return the memory it took in MiB."""
    from flamingo_ft.adapters import merge
    from flamingo_ft.evaluation.merging import merge_adapter

    merge.LARGEST_SHARD = f"{shard}MB"
    warm_up()
    before, own = status("RssAnon"), PeakOfOwnMemory()
    merge_adapter(folder / "adapter", folder / "merged", base=base, margin=100.0)
    sizes = [file.stat().st_size / MIB for file in (folder / "merged").glob("*.safetensors")]
    return {"grown": own.stop() - before, "model": sum(sizes), "largest": max(sizes)}


if __name__ == "__main__":
    main()
