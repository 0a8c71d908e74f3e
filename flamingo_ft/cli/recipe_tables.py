"""What `flamingo-ft check` and `flamingo-ft plan` print, as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flamingo_ft.cli.output import print_json, titled_table
from flamingo_ft.formatting import gib, one_line, percent, plural
from flamingo_ft.model.images import CONVERSIONS

_MEMORY_COLUMNS = ("params", "frozen", "trained", "grads", "state", "all")
_STATISTICS = {"least": "min", "median": "median", "mean": "mean", "most": "max"}  # key -> header
_DISTRIBUTIONS = {
    "turns": "turns",
    "images": "images and videos",
    "views": "their tiles and frames",
    "text_tokens": "text tokens",
    "label_tokens": "text tokens in the loss",
}
ROWS_SHOWN = 3  # of those with the same problem
_CLASSIFIERS = {
    "majority": "majority",
    "nearest_neighbour": "1-NN",
    "linear_pooled": "pooled",
    "linear_attended": "attended",
    "best": "best",
}
PROBE_LEGEND = (
    "1-NN: the answer of the most similar training image; pooled, attended: a linear classifier on the mean "
    "of the tower's tokens, and on a mean weighted by a learned query"
)
_REPEATS = {
    "copies": "training samples that equal an earlier one",
    "leaked": "held-out samples that equal one that is trained on",
    "leaked_images": "held-out samples that show an image that is trained on (equal pixels in any file)",
}


def print_findings(record: Mapping[str, Any], as_json: bool, folder: Path) -> None:
    """Print the record of a check (check/check_report.py).

    Problems and warnings go to stderr, tables or JSON to stdout.
    """
    kind = "error" if record["on_bad_sample"] == "error" else "skipped"
    for line in problem_lines(record):
        print(f"{kind}: {line}", file=sys.stderr)
    if any(problem["row"] is not None for problem in record["first_problems"]):
        print("rows are numbered from 0; blank lines and table headers do not count", file=sys.stderr)
    for line in record["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if as_json:
        print_json(record)
        return
    for part in check_tables(record):
        Console().print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    print(f"full report, with the tokens of the first samples: {folder / 'check.html'}")


def check_tables(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield what is printed of a check on stdout."""
    yield from source_lines(record["parts"])
    yield from record["text_lines"]
    yield source_table(record["parts"])
    if any(part["conversions"] for part in record["parts"]):
        yield conversion_table(record["parts"])
    yield sample_table(record["distributions"])
    if record["too_long"]["samples"]:
        yield policy_table(record["too_long"])
    yield from repeat_lines(record["repeats"])
    yield from record["notes"]
    yield record["training"]
    if record["probe"]:
        yield from question_lines(record["probe"])
        yield probe_table(record["probe"])
        yield PROBE_LEGEND
        yield from record["probe_lines"]


def source_lines(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the name of each source, which the tables refer to by number, and its ignored columns of text."""
    for number, part in enumerate(parts, start=1):
        yield f"source {number}: {part['name']} ({part['split']}, format {part['format']})"
        if part["unread"]:
            names = ", ".join(f"{name} ({rows:,} rows)" for name, rows in part["unread"].items())
            yield f"source {number}: columns of text that the format does not read: {names}"


def source_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of what each source contains."""
    table = titled_table("sources")
    columns = ("rows", "samples", "dropped", "bad", "images", "videos")
    for header in ("source", *columns, "in the loss"):
        table.add_column(header, justify="right")
    for number, part in enumerate(parts, start=1):
        counts = (f"{part[column]:,}" for column in columns)
        table.add_row(str(number), *counts, percent(part["label_tokens"], part["text_tokens"]))
    return table


def conversion_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the images of each source that are not upright 8-bit RGB, by conversion."""
    table = titled_table("images and videos converted to upright 8-bit RGB, by source")
    table.add_column("conversion")
    for number in range(1, len(parts) + 1):
        table.add_column(str(number), justify="right")
    table.add_column("what is done")
    for name, description in CONVERSIONS.items():
        counts = [part["conversions"].get(name, 0) for part in parts]
        if any(counts):
            table.add_row(name, *(f"{count:,}" for count in counts), description)
    return table


def sample_table(distributions: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of the lengths of training samples."""
    table = titled_table("training samples")
    table.add_column("per sample")
    for header in _STATISTICS.values():
        table.add_column(header, justify="right")
    for name, label in _DISTRIBUTIONS.items():
        values = distributions[name]
        if name == "views" and values == distributions["images"]:
            continue
        table.add_row(label, *(f"{values[key]:,.{1 if key == 'mean' else 0}f}" for key in _STATISTICS))
    share = distributions["loss_share"]
    table.add_row("share in the loss", *(percent(share[key]) for key in _STATISTICS))
    return table


def policy_table(too_long: Mapping[str, Any]) -> Table:
    """Return a table of what each value of data.too_long removes from the samples that are too long."""
    table = titled_table(
        f"{too_long['samples']:,} training samples over {too_long['limit']:,} text tokens; "
        "data.too_long removes"
    )
    table.add_column("policy")
    columns = ("samples", "turns", "tokens", "images")
    for column in columns:
        table.add_column(column, justify="right")
    for policy, lost in too_long["policies"].items():
        name = f"{policy} (the recipe's)" if policy == too_long["policy"] else policy
        table.add_row(name, *(f"{lost[column]:,}" for column in columns))
    return table


def repeat_lines(repeats: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each kind of duplicate that occurs."""
    for name, label in _REPEATS.items():
        if repeats[name]:
            yield f"{label}: {repeats[name]:,}"
    if repeats["images_asked_again"]:
        verb = "is" if repeats["images_asked_again"] == 1 else "are"
        images = f"{repeats['images']:,} distinct images"
        yield f"{repeats['images_asked_again']:,} of {images} {verb} used more than once with the same prompt"


def question_lines(probe: Mapping[str, Any]) -> Iterator[str]:
    """Yield each probed question, which the table refers to by number, and what was left out."""
    for number, row in enumerate(probe["questions"], start=1):
        more = len(row["wordings"]) - 1
        wordings = f", and {plural(more, 'other wording')}" if more else ""
        left_out = f"; left out: {_reasons(row['left_out'])}" if row["left_out"] else ""
        yield f"question {number}: {row['question']}{wordings} ({row['kind']}{left_out})"
    if probe["left_out"]:
        yield f"held-out samples of questions that are not probed: {_reasons(probe['left_out'])}"


def _reasons(left_out: Mapping[str, int]) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())


def probe_table(probe: Mapping[str, Any]) -> Table:
    """Return a table of the shares of held-out answers that classifiers get right from the tower's tokens."""
    table = titled_table("what the vision tower can tell: share of held-out answers")
    table.collapse_padding = True  # so that nine columns fit a terminal of 80
    columns = ("no.", "answers", "train", "eval", *_CLASSIFIERS.values())
    for header in columns:
        table.add_column(header, justify="right")
    for number, row in enumerate(probe["questions"], start=1):
        counts = (number, len(row["answers"]), row["train_samples"], row["eval_samples"])
        table.add_row(*(f"{count:,}" for count in counts), *(percent(row[key]) for key in _CLASSIFIERS))
    return table


def problem_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each kind of the first problems, and the number of further ones."""
    rows: dict[tuple, list[int | None]] = {}
    for problem in record["first_problems"]:
        rows.setdefault((problem["file"], problem["field"], problem["problem"]), []).append(problem["row"])
    for (file, field, problem), numbers in rows.items():
        parts = (file, _rows_text(numbers), field, problem)
        yield one_line(": ".join(part for part in parts if part is not None))
    more = record["problems"] - len(record["first_problems"])
    if more > 0:
        yield f"and {more:,} more problems"


def _rows_text(numbers: Sequence[int | None]) -> str | None:
    """Return the rows with one problem in words; None for a problem of a whole file."""
    if numbers[0] is None:
        return None
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    shown = ", ".join(str(number) for number in numbers[:ROWS_SHOWN])
    more = len(numbers) - ROWS_SHOWN
    return f"rows {shown}" + (f" and {more:,} more" if more > 0 else "")


def print_plan(record: Mapping[str, Any], as_json: bool, stderr: bool = False) -> None:
    """Print the record of a `PlanReport` (plan/plan_report.py)."""
    if as_json:
        print_json(record)
        return
    for part in plan_tables(record):
        Console(stderr=stderr).print(part)


def plan_tables(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield what is printed of a plan, sizes in GiB; in the record they are in bytes."""
    if "stages" in record:
        yield stage_table(record["stages"])
        yield f"stage {record['largest']} needs the most memory:"
    yield memory_table(record["cuda"], "on a GPU")
    yield batch_line(record["cuda"])
    yield gpu_table(record["gpus"], record["assumed"])
    if record["changes"]:
        yield changes_table(record["changes"])
    if record["cpu"]:
        peak = gib(record["cpu"]["peak"])
        yield f"without a GPU: {peak} GiB of host RAM for tensors, and what Python itself takes"


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Return the peak of each stage and, as that of the whole run, the largest of them."""
    table = titled_table("peak memory of each stage, GiB")
    table.add_column("stage", no_wrap=True)
    devices = {"cuda_peak": "on a GPU", "cpu_peak": "without one, host RAM"}
    planned = {key: header for key, header in devices.items() if stages[0][key] is not None}
    for header in ("params", *planned.values()):
        table.add_column(header, justify="right")
    for stage in stages:
        peaks = (gib(stage[key]) for key in planned)
        table.add_row(stage["name"], _millions(stage["trainable_parameters"]), *peaks)
    table.add_section()
    table.add_row("the whole run", "", *(gib(max(stage[key] for stage in stages)) for key in planned))
    return table


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
    answers = f" x {batch['answers']} answers" if batch["answers"] > 1 else ""
    line = (
        f"for {batch['samples']}{answers} x {batch['text_tokens']} text tokens ({batch['where_from']}), "
        f"{plural(batch['images'], 'image')} per sample"
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
