"""Record what MPT-1B's original code computes on a tiny model.

Run `python -m tests.golden.record_mosaic_gpt FOLDER`.

FOLDER has the Python files beside the weights on the Hub (anas-awadalla/mpt-1b-redpajama-200b: mosaic_gpt.py
and the modules it imports), as a package of any name; they need einops and no patch. Writes
mosaic_gpt.safetensors.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.golden.deterministic_weights import fill
from tests.golden.measurements import gradient_table
from tests.golden.mosaic_gpt import FILE, KIND, SHAPE, loss_gradients, measure
from tests.golden.recorded import TOLERANCE


def original(folder: Path) -> nn.Module:
    """Return the original model in float32 with deterministic weights."""
    sys.path.insert(0, str(folder.resolve().parent))
    config = importlib.import_module(f"{folder.name}.configuration_mosaic_gpt").MosaicGPTConfig(
        **SHAPE, **KIND
    )
    model = importlib.import_module(f"{folder.name}.mosaic_gpt").MosaicGPT(config).eval()
    fill(model, "lang_encoder.")
    return model


def record(folder: Path) -> None:
    """Write the float32 numbers. Raises RuntimeError if float64 gives others."""
    single, double = measure(original(folder)), measure(original(folder).double())
    for name in ("left_padded", "continued"):
        distance = (single[name] - double[name]).abs().max() / double[name].abs().max()
        if distance > TOLERANCE:
            raise RuntimeError(f"{name}: float32 and float64 differ by {distance:.1e}")
    if not torch.equal(single["greedy"], double["greedy"]):
        raise RuntimeError("greedy: float32 and float64 generate different tokens")
    loss, gradients = loss_gradients(original(folder).double())
    tensors = {**single, "loss": loss.float(), "gradients": gradient_table(gradients)}
    about = {"versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "einops"))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, FILE, about)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
