"""Run in a process of its own, since a broken package may end it: one JSON line for each step of the command line.

A step is the name of a module to import, or one of `STEPS`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable

GIB = 2**30


def memory() -> dict[str, object]:
    """Of the host, in GiB."""
    import psutil

    found = psutil.virtual_memory()
    return {"total_gib": found.total / GIB, "free_gib": found.available / GIB}


def devices() -> dict[str, object]:
    """torch's builds, and its GPUs with memory in GiB and the dtypes that each computes in hardware."""
    import torch

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
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def four_bit() -> dict[str, object]:
    """Whether a matrix in 4 bits can be multiplied here."""
    return _quantized("nf4")


def eight_bit() -> dict[str, object]:
    """Whether a matrix in 8 bits can be multiplied here."""
    return _quantized("int8")


def _quantized(kind: str) -> dict[str, object]:
    import torch

    from flamingo_ft.backbones.device_and_dtype import default_device
    from flamingo_ft.backbones.quantization import Quantization, quantize_linears

    device = default_device()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).requires_grad_(False)
    x = torch.randn(4, 64, device=device)
    exact = model.to(device)(x)
    quantize_linears(model, Quantization(kind))
    away = (model.to(device)(x).float() - exact).norm() / exact.norm()
    if not away < 0.5:
        raise ArithmeticError(f"the product is {away:.2g} away from the exact one")
    return {"device": device.type}


STEPS: dict[str, Callable[[], dict[str, object]]] = {
    "memory": memory,
    "devices": devices,
    "4-bit": four_bit,
    "8-bit": eight_bit,
}


def run(steps: list[str]) -> None:
    """Print what each step found; the first that fails ends the process with its traceback."""
    for step in steps:
        found = STEPS[step]() if step in STEPS else {"imported": importlib.import_module(step) is not None}
        print(
            "\n" + json.dumps({"step": step, **found}), flush=True
        )  # what it printed may have left a line open


if __name__ == "__main__":
    run(sys.argv[1:])
