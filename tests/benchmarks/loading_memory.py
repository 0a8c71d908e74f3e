"""Peak memory of loading backbones quantized: `python -m tests.benchmarks.loading_memory`.

Makes a random sharded language model and a file with a random ViT-L-14 in a temporary folder, and loads each
in a fresh process for every format. A line per case: how far the resident set grew at most (VmHWM less VmRSS
before), and what was to be held: the loaded model and the largest file that it is read from. Linux only, and
on the CPU.

The growth counts the pages of mapped files, of which transformers maps all shards at once: these the system
drops when it needs memory. Own memory (RssAnon) it cannot drop. That counts too what the allocator keeps of
matrices given back, which varies from run to run; MALLOC_MMAP_THRESHOLD_=131072 in the environment has it
give back everything.
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

import flamingo_ft  # noqa: F401, before transformers: it sets what bitsandbytes may say

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
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(*given.case)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            place = Path(folder) / part
            make_language(place, given.megabytes, given.shard) if part == "language" else make_vision(place)
            for wanted in given.formats:
                print(line(part, wanted, in_fresh_process(part, wanted, place)), flush=True)


def make_language(folder: Path, megabytes: int, shard: int) -> None:
    """A random Llama with a 32 MB embedding and as many layers as make up the size."""
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
    """A file with both random towers of a ViT-L-14, as OpenCLIP's checkpoints have them."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    model = open_clip.create_model(TOWER)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights_of(folder))


def weights_of(folder: Path) -> Path:
    return folder / "open_clip_model.safetensors"


def in_fresh_process(part: str, wanted: str, place: Path) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.loading_memory", "--case", part, wanted, str(place)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(part: str, wanted: str, found: dict) -> str:
    held = found["model"] + found["largest"]
    return (
        f"{part:8} {wanted:4} grew {found['grown']:6.0f} MiB (own memory {found['own']:6.0f})  "
        f"model {found['model']:6.0f} + largest file {found['largest']:6.0f} = {held:6.0f} MiB  "
        f"{found['seconds']:5.1f} s"
    )


def measure(part: str, wanted: str, place: str) -> dict:
    """Load one backbone, and tell in MiB what that took."""
    from flamingo_ft.backbones.language import load_language
    from flamingo_ft.backbones.quantization import Quantization
    from flamingo_ft.backbones.vision import load_vision

    warm_up()
    quantization = None if wanted == "none" else Quantization(wanted)
    before, own_before = status("VmRSS"), status("RssAnon")
    began, own = time.monotonic(), PeakOfOwnMemory()
    if part == "language":
        loaded = load_language(place, quantization=quantization, device="cpu").model
    else:
        loaded = load_vision(
            TOWER, str(weights_of(Path(place))), quantization=quantization, device="cpu"
        ).visual
    seconds = time.monotonic() - began
    return {
        "grown": status("VmHWM") - before,
        "own": own.stop() - own_before,
        "model": bytes_of(loaded) / MIB,
        "largest": max(file.stat().st_size for file in Path(place).glob("*.safetensors")) / MIB,
        "seconds": seconds,
    }


def warm_up() -> None:
    """What the first use of each library takes is not loading."""
    from flamingo_ft.backbones.quantization import Quantization, quantize_linears

    for wanted in ("int8", "nf4"):
        quantize_linears(nn.Sequential(nn.Linear(64, 64)), Quantization(wanted))
    gc.collect()


class PeakOfOwnMemory:
    """The largest RssAnon of this process, in MiB, looked up every few milliseconds until `stop`."""

    def __init__(self) -> None:
        self._peak, self._stopped = status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stopped.wait(0.005):
            self._peak = max(self._peak, status("RssAnon"))

    def stop(self) -> float:
        self._stopped.set()
        self._thread.join()
        return self._peak


def status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    found = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{field}:")
    )
    return int(found.split()[1]) / 1024


def bytes_of(model: nn.Module) -> int:
    """What the model's tensors take, the scales of quantized matrices included; a tied matrix counts once."""
    tensors = {
        tensor.data_ptr(): tensor
        for tensor in model.state_dict().values()
        if isinstance(tensor, torch.Tensor)
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    main()
