"""The memory plan of `flamingo-ft plan`, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flamingo_ft.cli.output import print_json, titled_table
from flamingo_ft.formatting import gib, percent

_MEMORY_COLUMNS = ("params", "frozen", "trained", "grads", "state", "all")


def print_plan(record: Mapping[str, Any], as_json: bool, stderr: bool = False) -> None:
    """Print the record of a `PlanReport` (plan/plan_report.py)."""
    if as_json:
        print_json(record)
        return
    for part in plan_tables(record):
        Console(stderr=stderr).print(part)


def plan_tables(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield what is printed of a plan, sizes in GiB; in the record they are in bytes."""
    yield memory_table(record["cuda"], "on a GPU")
    yield batch_line(record["cuda"])
    yield gpu_table(record["gpus"], record["assumed"])
    if record["changes"]:
        yield changes_table(record["changes"])
    if record["cpu"]:
        peak = gib(record["cpu"]["peak"])
        yield f"without a GPU: {peak} GiB of host RAM for tensors, and what Python itself takes"


def memory_table(plan: Mapping[str, Any], device: str) -> Table:
    """Return the memory of each component, with its trainable parameters, and then the sum at the peak."""
    table = titled_table(f"memory of a training step {device}, GiB")
    table.add_column("component", no_wrap=True)
    for header in _MEMORY_COLUMNS:
        table.add_column(header, justify="right")
    for part in plan["components"]:
        sizes = (part["frozen"], part["trainable"], part["gradients"], part["optimizer"])
        table.add_row(
            part["name"], _millions(part["trainable_parameters"]), *map(gib, sizes), gib(sum(sizes))
        )
    table.add_section()
    at_peak = {
        "weights, optimizer": plan["peak"] - plan["activations"] - plan["gradients_at_peak"],
        "gradients by then": plan["gradients_at_peak"],
        "activations, copies": plan["activations"],
    }
    for name, size in at_peak.items():
        table.add_row(name, "", "", "", "", "", gib(size))
    table.add_row("peak", _millions(plan["trainable_parameters"]), "", "", "", "", gib(plan["peak"]))
    return table


def batch_line(plan: Mapping[str, Any]) -> str:
    """Return a line about the batch that was planned for, and about paged optimizer state."""
    batch = plan["batch"]
    line = (
        f"for {batch['samples']} x {batch['text_tokens']} text tokens ({batch['where_from']}), "
        f"{batch['images']} images per sample"
    )
    if plan["paged"]:
        line += f"; {gib(plan['paged'])} GiB of optimizer state are paged and may be moved to host RAM"
    return line


def gpu_table(gpus: Sequence[Mapping[str, Any]], assumed: Mapping[str, float]) -> Table:
    """Return a table of GPUs and whether the run fits on them."""
    overhead = (
        f"{gib(assumed['cuda_context'])} GiB for CUDA and {percent(assumed['fragmentation'], digits=0)} "
        "for fragmentation"
    )
    table = titled_table(f"does it fit? including {overhead}")
    table.add_column("GPU")
    for header in ("usable GiB", "needed GiB", "fits"):
        table.add_column(header, justify="right")
    for gpu in gpus:
        fits = "yes" if gpu["fits"] else "no"
        table.add_row(gpu["name"], f"{gpu['usable_gib']:.1f}", gib(gpu["needed"]), fits)
    return table


def changes_table(changes: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of overrides that save memory, each applied on top of those above it."""
    table = titled_table("what to change, one on top of the other")
    table.add_column("override", overflow="fold")
    for header in ("saves GiB", "peak GiB"):
        table.add_column(header, justify="right")
    for change in changes:
        table.add_row(" ".join(change["overrides"]), gib(change["saved"]), gib(change["peak"]))
    return table


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M" if parameters else ""
