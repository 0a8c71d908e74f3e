"""Peak memory of loading backbones quantized: `python -m tests.benchmarks.loading_memory`.

Makes a random sharded language model and a file with a random ViT-L-14 in a temporary folder, and loads each
in a fresh process for every format. Prints for each case the growth of the peak resident set (VmHWM minus
VmRSS before), and what has to fit: the loaded model and the largest file that it is read from. Linux and CPU
only.

The growth includes the pages of mapped files (transformers maps all shards at once), which the system drops
when it needs memory. It cannot drop the process's own memory (RssAnon).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

import flamingo_ft  # noqa: F401, before transformers: it silences warnings of bitsandbytes

MIB = 2**20
FORMATS = ("none", "int8", "nf4")
TOWER = "ViT-L-14"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of loading backbones quantized.")
    parser.add_argument(
        "--megabytes", type=int, default=800, help="of the language model's weights, in float32"
    )
    parser.add_argument("--shard", type=int, default=200, help="megabytes of a shard")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--parts", nargs="+", choices=("language", "vision"), default=("language", "vision"))
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            path = Path(folder) / part
            make_language(path, args.megabytes, args.shard) if part == "language" else make_vision(path)
            for quantization_format in args.formats:
                print(
                    format_result(
                        part, quantization_format, in_fresh_process(part, quantization_format, path)
                    ),
                    flush=True,
                )


def make_language(folder: Path, megabytes: int, shard: int) -> None:
    """Save a random Llama with a 32 MB embedding and as many layers as fill ``megabytes``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.backbones.test_language import save_tokenizer

    width = 1024
    bytes_per_layer = 4 * (4 * width * width + 3 * width * 4 * width)
    layers = max(1, megabytes * 10**6 // bytes_per_layer)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=8000, num_attention_heads=16, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=f"{shard}MB")
    save_tokenizer(folder)


def make_vision(folder: Path) -> None:
    """Save both random towers of a ViT-L-14 in one file, as in OpenCLIP's checkpoints."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    model = open_clip.create_model(TOWER)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights_of(folder))


def weights_of(folder: Path) -> Path:
    return folder / "open_clip_model.safetensors"


def in_fresh_process(part: str, quantization_format: str, path: Path) -> dict:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.loading_memory",
        "--case",
        part,
        quantization_format,
        str(path),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def format_result(part: str, quantization_format: str, result: dict) -> str:
    held = result["model"] + result["largest"]
    return (
        f"{part:8} {quantization_format:4} "
        f"grew {result['grown']:6.0f} MiB (own memory {result['own']:6.0f})  "
        f"model {result['model']:6.0f} + largest file {result['largest']:6.0f} = {held:6.0f} MiB  "
        f"{result['seconds']:5.1f} s"
    )


def measure(part: str, quantization_format: str, path: str) -> dict:
    """Load one backbone, and return the memory it took in MiB."""
    from flamingo_ft.backbones.language import load_language
    from flamingo_ft.backbones.quantization import Quantization
    from flamingo_ft.backbones.vision import load_vision

    warm_up()
    quantization = None if quantization_format == "none" else Quantization(quantization_format)
    before, own_before = status("VmRSS"), status("RssAnon")
    start, own = time.monotonic(), PeakOfOwnMemory()
    if part == "language":
        loaded = load_language(path, quantization=quantization, device="cpu").model
    else:
        loaded = load_vision(
            TOWER, str(weights_of(Path(path))), quantization=quantization, device="cpu"
        ).visual
    seconds = time.monotonic() - start
    return {
        "grown": status("VmHWM") - before,
        "own": own.stop() - own_before,
        "model": bytes_of(loaded) / MIB,
        "largest": max(file.stat().st_size for file in Path(path).glob("*.safetensors")) / MIB,
        "seconds": seconds,
    }


def warm_up() -> None:
    """Use each library once, so that its initialization is not measured."""
    from flamingo_ft.backbones.quantization import Quantization, quantize_linears

    for quantization_format in ("int8", "nf4"):
        quantize_linears(nn.Sequential(nn.Linear(64, 64)), Quantization(quantization_format))
    gc.collect()


class PeakOfOwnMemory:
    """The peak RssAnon of this process in MiB, sampled every few milliseconds until `stop`."""

    def __init__(self) -> None:
        self._peak, self._stopped = status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(0.005):
            self._peak = max(self._peak, status("RssAnon"))

    def stop(self) -> float:
        self._stopped.set()
        self._thread.join()
        return self._peak


def status(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    line = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{field}:")
    )
    return int(line.split()[1]) / 1024


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of the model's tensors and quantization scales; a tied matrix counts once."""
    tensors = {
        tensor.data_ptr(): tensor
        for tensor in model.state_dict().values()
        if isinstance(tensor, torch.Tensor)
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    main()
