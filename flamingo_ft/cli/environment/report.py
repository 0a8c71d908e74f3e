"""Versions, hardware, supported dtypes and missing extras; whatever is broken is reported, nothing of it raises."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flamingo_ft.formatting import GIB
from flamingo_ft.version import __version__

from .anonymous import anonymous

PROBE = Path(__file__).with_name("probe.py")
TIMEOUT_SECONDS = 300
PACKAGES = {  # distribution: module
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "peft": "peft",
    "trl": "trl",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets",
    "open_clip_torch": "open_clip",
    "huggingface_hub": "huggingface_hub",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "pillow": "PIL",
    "numpy": "numpy",
}
EXTRAS = {  # extra: what it is for, its modules
    "video": ("samples with video files", ("av",)),
    "serve": ("flamingo-ft serve", ("fastapi", "starlette", "uvicorn", "openai")),
    "trackio": ("train.report_to: [trackio]", ("trackio",)),
    "wandb": ("train.report_to: [wandb]", ("wandb",)),
    "notebook": ("the notebooks", ("ipykernel", "ipywidgets")),
}
VARIABLES = (  # that change what runs, and hold nothing private
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "RANK",
    "WORLD_SIZE",
)
_WORKS = ("4-bit", "8-bit")


def environment() -> dict[str, Any]:
    """All of it as JSON. The packages are imported in another process, which they cannot take down."""
    installed = {name: _version(name) for name in PACKAGES}
    modules = [PACKAGES[name] for name, found in installed.items() if found is not None]
    found, problems = _probe(["memory", "devices", *modules, *_WORKS])
    return {
        "flamingo_ft": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "packages": {
            name: {"version": number, "problem": problems.get(PACKAGES[name])}
            for name, number in installed.items()
        },
        "devices": found.get("devices") or {"problem": problems.get("devices")},
        "driver": _driver(),
        "quantization": {step: {"works": step in found, "problem": problems.get(step)} for step in _WORKS},
        "cpu": {"cores": os.cpu_count(), "usable_cores": _usable_cores(), "machine": platform.machine()},
        "memory": found.get("memory") or {"problem": problems.get("memory")},
        "disk": _disk(),
        "missing_extras": dict(_missing_extras()),
        "variables": {name: anonymous(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def as_text(record: Mapping[str, Any]) -> str:
    """For people, and for a bug report: plain lines that are a Markdown list too."""
    lines = [
        f"- flamingo_ft: {record['flamingo_ft']}",
        f"- Python: {record['python']} on {record['platform']}",
        *(f"- {name}: {_package(found)}" for name, found in record["packages"].items()),
        *_device_lines(record["devices"], record["driver"]),
        *(f"- {step} matrices: {_works(found)}" for step, found in record["quantization"].items()),
        f"- CPU: {record['cpu']['cores']} cores ({record['cpu']['usable_cores']} usable), {record['cpu']['machine']}",
        f"- host RAM: {_size(record['memory'])}",
        f"- disk of the current directory: {_size(record['disk'])}",
        *(_extra_line(name, found) for name, found in record["missing_extras"].items()),
        *(f"- {name}={value}" for name, value in record["variables"].items()),
    ]
    return "\n".join(lines)


def _probe(steps: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each step found, and why others failed. A step that ends the process is left out of the next one."""
    found: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    waiting = list(steps)
    while waiting:
        output, error = _run_probe(waiting)
        done = [json.loads(line) for line in output.splitlines() if line.startswith('{"step": ')]
        found |= {one.pop("step"): one for one in done}
        waiting = [step for step in waiting if step not in found]
        if waiting:
            problems[waiting.pop(0)] = anonymous(error)
    return found, problems


def _run_probe(steps: Sequence[str]) -> tuple[str, str]:
    """Output, and the last line of the error output. As text, so that no file beside it is imported by mistake."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", PROBE.read_text(encoding="utf-8"), *steps]
    options = {"text": True, "errors": "replace", "env": variables, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            output, error = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return output, f"did not end within {TIMEOUT_SECONDS} s"
    lines = [line for line in error.splitlines() if line.strip()]
    return output, lines[-1] if lines else f"the process ended with code {process.returncode}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """NVIDIA's driver, which decides which builds of torch find the GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _disk() -> dict[str, Any]:
    try:
        found = shutil.disk_usage(Path.cwd())
    except OSError as error:
        return {"problem": error.strerror}
    return {"total_gib": found.total / GIB, "free_gib": found.free / GIB}


def _missing_extras() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (purpose, modules) in EXTRAS.items():
        if missing := [module for module in modules if find_spec(module) is None]:
            yield name, {"for": purpose, "missing": missing}


def _package(found: Mapping[str, Any]) -> str:
    if found["version"] is None:
        return "not installed"
    return f"{found['version']} (BROKEN: {found['problem']})" if found["problem"] else found["version"]


def _device_lines(devices: Mapping[str, Any], driver: str | None) -> Iterator[str]:
    build = (
        devices.get("cuda") and f"CUDA {devices['cuda']}" or devices.get("hip") and f"ROCm {devices['hip']}"
    )
    yield f"- torch is built for: {build or 'CPU'}; NVIDIA driver: {driver or 'none found'}"
    if "gpus" not in devices:
        yield f"- GPUs: unknown ({devices['problem']})"
        return
    for number, gpu in enumerate(devices["gpus"]):
        kind = f"compute capability {gpu['compute_capability']}, {', '.join(gpu['dtypes'])}"
        yield f"- GPU {number}: {gpu['name']}, {_size(gpu)}, {kind}"
    if not devices["gpus"]:
        yield f"- GPUs: none that torch can use{' (MPS is there)' if devices['mps_available'] else ''}"
    yield f"- CPU instructions: {devices['cpu_capability']}, {devices['threads']} threads; dtypes fp32, bf16"


def _works(found: Mapping[str, Any]) -> str:
    return "work" if found["works"] else f"do not work ({found['problem']})"


def _size(found: Mapping[str, Any]) -> str:
    if "total_gib" not in found:
        return f"unknown ({found['problem']})"
    return f"{found['total_gib']:.1f} GiB, {found['free_gib']:.1f} GiB free"


def _extra_line(name: str, found: Mapping[str, Any]) -> str:
    missing = ", ".join(found["missing"])
    return f"- missing extra {name} ({missing}), for {found['for']}: pip install 'flamingo_ft[{name}]'"
