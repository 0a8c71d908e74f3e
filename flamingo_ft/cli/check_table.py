"""What a check of the data found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from flamingo_ft.formatting import percent
from flamingo_ft.model.images import CONVERSIONS

_OF_A_SAMPLE = {
    "turns": "turns",
    "images": "images and videos",
    "text_tokens": "text tokens",
    "label_tokens": "text tokens with loss",
}


def check_tables(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """What to print of the record of `CheckReport` (check/check_report.py)."""
    yield from source_lines(record["parts"])
    yield from record["text_lines"]
    yield source_table(record["parts"])
    if any(part["conversions"] for part in record["parts"]):
        yield conversion_table(record["parts"])
    yield sample_table(record["distributions"])
    if record["too_long"]["samples"]:
        yield policy_table(record["too_long"])
    yield from repeat_lines(record["repeats"])
    yield record["training"]


def source_lines(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the sources are called in the table below."""
    for number, part in enumerate(parts, start=1):
        yield f"source {number}: {part['name']} ({part['split']}, schema {part['format']})"
        if part["unread"]:
            names = ", ".join(f"{name} ({rows:,} rows)" for name, rows in part["unread"].items())
            yield f"source {number}: columns of text that the schema does not read: {names}"


def source_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """What each source holds."""
    table = _table("sources")
    columns = ("rows", "samples", "dropped", "bad", "images", "videos")
    for header in ("source", *columns, "with loss"):
        table.add_column(header, justify="right")
    for number, part in enumerate(parts, start=1):
        share = part["label_tokens"] / part["text_tokens"] if part["text_tokens"] else None
        table.add_row(str(number), *(f"{part[column]:,}" for column in columns), percent(share))
    return table


def conversion_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """How many images of each source are not stored as upright 8-bit RGB, and what becomes of them."""
    table = _table("images and videos converted to upright 8-bit RGB, by source")
    table.add_column("conversion")
    for number in range(1, len(parts) + 1):
        table.add_column(str(number), justify="right")
    table.add_column("what is done")
    for name, done in CONVERSIONS.items():
        counts = [part["conversions"].get(name, 0) for part in parts]
        if any(counts):
            table.add_row(name, *(f"{count:,}" for count in counts), done)
    return table


def sample_table(distributions: Mapping[str, Mapping[str, Any]]) -> Table:
    """How long training samples are."""
    table = _table("training samples")
    table.add_column("of a sample")
    for header in ("least", "median", "mean", "most"):
        table.add_column(header, justify="right")
    for name, told in _OF_A_SAMPLE.items():
        values = distributions[name]
        table.add_row(
            told, *(f"{values[key]:,.{int(key == 'mean')}f}" for key in ("least", "median", "mean", "most"))
        )
    share = distributions["loss_share"]
    table.add_row("share with loss", *(percent(share[key]) for key in ("least", "median", "mean", "most")))
    return table


def policy_table(too_long: Mapping[str, Any]) -> Table:
    """What each policy takes of samples that are too long."""
    title = f"{too_long['samples']:,} training samples over {too_long['limit']:,} text tokens; data.too_long takes away"
    table = _table(title)
    table.add_column("policy")
    columns = ("samples", "turns", "tokens", "images")
    for column in columns:
        table.add_column(column, justify="right")
    for policy, lost in too_long["policies"].items():
        name = f"{policy} (the recipe's)" if policy == too_long["policy"] else policy
        table.add_row(name, *(f"{lost[column]:,}" for column in columns))
    return table


def repeat_lines(repeats: Mapping[str, Any]) -> Iterator[str]:
    """What is there more than one time."""
    for name, told in {
        "copies": "training samples that equal an earlier one",
        "leaked": "held-out samples that equal one that is trained on",
        "leaked_images": "held-out samples that show an image that is trained on",
        "repeated_images": "images in more than one place",
    }.items():
        if repeats[name]:
            yield f"{told}: {repeats[name]:,}" + (
                f" of {repeats['images']:,}" if name == "repeated_images" else ""
            )


def problem_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The first problems, a line each, and how many more there are."""
    for problem in record["first_problems"]:
        row = None if problem["row"] is None else f"row {problem['row']}"
        parts = (problem["file"], row, problem["field"], problem["problem"])
        yield " ".join(": ".join(part for part in parts if part is not None).split())
    if record["problems"] > len(record["first_problems"]):
        yield f"and {record['problems'] - len(record['first_problems']):,} more problems"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
