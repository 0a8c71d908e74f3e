"""What separates the cells of a .csv or .tsv file: not always what its name says."""

from __future__ import annotations

import csv
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from flamingo_ft.data.schemas.columns import plain
from flamingo_ft.data.schemas.reader import ALL_FIELDS

DELIMITERS = (",", ";", "\t")
USUAL = {".csv": ",", ".tsv": "\t"}
HEAD_LINES = 64
SEP_LINE = re.compile(rb'"?sep=([,;\t])"?\r?\n')  # Excel writes it before the header


class Dialect(NamedTuple):
    """delimiter: between cells. begin: the byte at which the header starts."""

    delimiter: str
    begin: int


def dialect_of(path: Path, begin: int) -> Dialect:
    """The delimiter that the file itself states, or that makes most of its header.

    Most: more names of known fields; if equal, a header of as many cells as the first row has; if equal, more cells.
    A header that no delimiter divides is one column. Delimiters in quotes do not count.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        lines = [*islice(file, HEAD_LINES)]
    stated = SEP_LINE.fullmatch(lines[0]) if lines else None
    if stated:
        return Dialect(stated[1].decode(), begin + len(lines[0]))
    usual = USUAL[path.suffix.lower()]
    candidates = (usual, *(delimiter for delimiter in DELIMITERS if delimiter != usual))
    return Dialect(max(candidates, key=lambda delimiter: _fit(lines, delimiter)), begin)


def _fit(lines: list[bytes], delimiter: str) -> tuple[int, bool, int]:
    """How well a delimiter fits the first lines; the first of equal ones is taken."""
    header, first = _first_records(lines, delimiter)
    if len(header) < 2:
        return 0, False, 0
    known = sum(plain(name) in ALL_FIELDS for name in header)
    return known, first is None or len(first) == len(header), len(header)


def _first_records(lines: list[bytes], delimiter: str) -> tuple[list[str], list[str] | None]:
    texts = (line.decode("utf-8", "replace") for line in lines)
    try:
        records = [*islice(filter(any, csv.reader(texts, delimiter=delimiter)), 2)]
    except csv.Error:
        return [], None
    return (records[0] if records else []), (records[1] if len(records) > 1 else None)
