"""check.html: one page that needs nothing beside it, neither files nor network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flamingo_ft.formatting import data_uri, percent
from flamingo_ft.model.images import CONVERSIONS
from flamingo_ft.version import __version__

from .findings import Findings
from .preview import Shown
from .rows import Problem

PAGE_FILE = "check.html"


def write_page(
    folder: Path,
    findings: Findings,
    problems: Iterable[Problem],
    shown: Sequence[Sequence[Shown]],
    figures: Mapping[str, Path],
) -> None:
    """Write the page. problems: all of them, written as they come. shown: of each source its first samples.

    What users wrote is escaped, and the page may run no scripts.
    """
    loader = PackageLoader("flamingo_ft.check", "")
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, **blocks)
    page = environment.get_template("check.html.jinja").stream(
        version=__version__,
        findings=findings,
        problems=problems,
        shown=[(part, samples) for part, samples in zip(findings.parts, shown, strict=True) if samples],
        figures={name: data_uri(path.read_bytes()) for name, path in figures.items()},
        percent=percent,
        conversions=_conversions(findings),
        short=partial(_short, _common_folder(findings)),
    )
    page.enable_buffering(64)
    with open(folder / PAGE_FILE, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(page)


def _conversions(findings: Findings) -> list[tuple[str, str, list[int]]]:
    """Each conversion that took place: its name, what is done, and for how many images of each source."""
    rows = []
    for name, done in CONVERSIONS.items():
        counts = [part.conversions.get(name, 0) for part in findings.parts]
        if any(counts):
            rows.append((name, done, counts))
    return rows


def _common_folder(findings: Findings) -> str:
    """The folder that all sources are in, which need not be told each time; nothing where some are on the Hub."""
    folders = [os.path.dirname(part.name) for part in findings.parts]
    return os.path.commonpath(folders) + os.sep if all(map(os.path.isabs, folders)) else ""


def _short(folder: str, name: str) -> str:
    return name.removeprefix(folder)
