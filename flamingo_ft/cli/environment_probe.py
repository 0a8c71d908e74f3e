"""Script that `flamingo-ft env` runs in a separate process, since a broken package may crash it.

Each argument is a step: a module to import, or a key of `STEPS`. It prints one line of JSON per step and
ends with a traceback at the first step that fails.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Literal

GIB = 2**30


def memory() -> dict[str, object]:
    """Return the host RAM in GiB."""
    import psutil

    ram = psutil.virtual_memory()
    return {"total_gib": ram.total / GIB, "free_gib": ram.available / GIB}


def devices() -> dict[str, object]:
    """Return torch's build, its GPUs with memory in GiB and the dtypes of their hardware, and the CPU."""
    import torch

    from flamingo_ft.backbones.compat import cpu_has_bf16

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        ampere = torch.version.hip is not None or major >= 8
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "total_gib": total / GIB,
                "free_gib": free / GIB,
                "compute_capability": f"{major}.{minor}",
                "dtypes": ["fp32", *(["tf32", "bf16"] if ampere else []), "fp16"],
            }
        )
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cuda_available": torch.cuda.is_available(),
        "mps_available": torch.backends.mps.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_has_bf16": cpu_has_bf16(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def four_bit() -> dict[str, object]:
    """Multiply a 4-bit matrix and return the device."""
    return _multiply_quantized("nf4")


def eight_bit() -> dict[str, object]:
    """Multiply an 8-bit matrix and return the device."""
    return _multiply_quantized("int8")


def _multiply_quantized(kind: Literal["int8", "nf4"]) -> dict[str, object]:
    import torch

    from flamingo_ft.backbones.quantization import Quantization, quantize_linears
    from flamingo_ft.processes import default_device

    device = default_device()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).requires_grad_(False)
    x = torch.randn(4, 64, device=device)
    exact = model.to(device)(x)
    quantize_linears(model, Quantization(kind))
    error = (model.to(device)(x).float() - exact).norm() / exact.norm()
    if not error < 0.5:  # NaN included
        raise ArithmeticError(f"the product has a relative error of {error:.2g}")
    return {"device": device.type}


STEPS: dict[str, Callable[[], dict[str, object]]] = {
    "memory": memory,
    "devices": devices,
    "4-bit": four_bit,
    "8-bit": eight_bit,
}


def run(steps: list[str]) -> None:
    """Run the steps in order and print the result of each."""
    for step in steps:
        result = STEPS[step]() if step in STEPS else {"imported": importlib.import_module(step) is not None}
        # On a line of its own: what a package printed may lack a line break.
        print("\n" + json.dumps({"step": step, **result}), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
