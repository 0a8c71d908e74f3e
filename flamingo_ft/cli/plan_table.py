"""A memory plan, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from flamingo_ft.formatting import gib, percent

_COLUMNS = ("frozen", "trained", "grads", "state")


def plan_tables(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """What to print of a report's record (plan/plan_report.py), sizes in bytes there and in GiB here."""
    yield memory_table(report["cuda"], "on a GPU")
    yield batch_line(report["cuda"])
    yield gpu_table(report["gpus"], report["assumed"])
    if report["changes"]:
        yield changes_table(report["changes"])
    if report["cpu"]:
        yield f"without a GPU: {gib(report['cpu']['peak'])} GiB of the computer's memory for tensors, and what Python takes"


def memory_table(plan: Mapping[str, Any], where: str) -> Table:
    """What each component keeps, with the parameters that train in it, then what comes together at the peak."""
    table = Table(
        title=f"memory of a training step {where}, GiB", title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    table.add_column("component", no_wrap=True)
    for header in ("params", *_COLUMNS, "all"):
        table.add_column(header, justify="right")
    for part in plan["components"]:
        sizes = (part["frozen"], part["trainable"], part["gradients"], part["optimizer"])
        table.add_row(
            part["name"], _millions(part["trainable_parameters"]), *map(gib, sizes), gib(sum(sizes))
        )
    table.add_section()
    beside = plan["activations"] + plan["gradients_at_peak"]
    for name, size in (
        ("weights, optimizer", plan["peak"] - beside),
        ("gradients by then", plan["gradients_at_peak"]),
        ("activations, copies", plan["activations"]),
    ):
        table.add_row(name, "", "", "", "", "", gib(size))
    table.add_row("peak", _millions(plan["trainable_parameters"]), "", "", "", "", gib(plan["peak"]))
    return table


def batch_line(plan: Mapping[str, Any]) -> str:
    """What the step was planned for."""
    batch = plan["batch"]
    line = (
        f"for {batch['samples']} x {batch['text_tokens']} text tokens ({batch['where_from']}), "
        f"{batch['images']} images to a sample"
    )
    paged = f"; {gib(plan['paged'])} GiB of optimizer state are paged, and may wait in the computer's memory"
    return line + (paged if plan["paged"] else "")


def gpu_table(gpus: Sequence[Mapping[str, Any]], assumed: Mapping[str, float]) -> Table:
    """Which cards hold the run."""
    beside = f"{gib(assumed['cuda_context'])} GiB for CUDA and {percent(assumed['fragmentation'], digits=0)} for gaps"
    table = Table(title=f"does it fit? with {beside}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("card")
    for header in ("usable GiB", "needed GiB", "fits"):
        table.add_column(header, justify="right")
    for gpu in gpus:
        table.add_row(
            gpu["name"], f"{gpu['usable_gib']:.1f}", gib(gpu["needed"]), "yes" if gpu["fits"] else "no"
        )
    return table


def changes_table(changes: Sequence[Mapping[str, Any]]) -> Table:
    """What to change, each on top of those above it."""
    table = Table(
        title="what to change, one on top of the other", title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    table.add_column("override", overflow="fold")
    for header in ("saves GiB", "peak GiB"):
        table.add_column(header, justify="right")
    for change in changes:
        table.add_row(" ".join(change["overrides"]), gib(change["saved"]), gib(change["peak"]))
    return table


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M" if parameters else ""
