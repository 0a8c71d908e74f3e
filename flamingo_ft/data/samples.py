"""All samples of a source at once, for data that fits in memory."""

from __future__ import annotations

from pathlib import Path

from flamingo_ft.config import DataSection, DataSource

from .sample import Sample
from .sources import open_source


def read_samples(
    source: DataSource | Path, image_root: Path | None = None, data: DataSection | None = None
) -> list[Sample]:
    """The samples of an entry of a recipe, or of a file, a pattern of files or a folder, checked.

    image_root: where a file's image paths start from, by default its folder. data: whose settings count, by default
    the usual ones. Raises UserError naming file, row (0-based, blank lines not counted) and field.
    """
    entry = source if isinstance(source, DataSource) else DataSource(path=source, image_root=image_root)
    opened = open_source(entry, data or DataSection(train=(entry,)))
    return [opened.sample(index, raw) for index, raw in enumerate(opened.stream())]
