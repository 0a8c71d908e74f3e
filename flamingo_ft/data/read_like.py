"""Read a data file as the run of an adapter read its own: with the columns that its recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from flamingo_ft.config import DataSource, load_recipe
from flamingo_ft.errors import UserError

from .sources import Source

TryOpen = Callable[[DataSource], Source]


def recorded_sources(recipe: Path) -> tuple[DataSource, ...]:
    """Return the sources of a run's recipe, the held-out ones first.

    () without a recipe, or for one that this version cannot read: answering does not depend on it.
    """
    if not recipe.is_file():
        return ()
    try:
        data = load_recipe(recipe, require=()).data
    except UserError:
        return ()
    return (*data.eval, *data.train)


def read_like(path: Path, sources: Sequence[DataSource], try_open: TryOpen) -> DataSource:
    """Return a file as a source.

    One of ``sources`` is read whole, with its own settings. A file whose columns no format has gets the
    format and columns of the first source that names columns, if it has those. Images that are not beside
    it are looked up where those of ``sources`` are.

    Args:
        try_open: opens a source. Raises UserError if it cannot be read.
    """
    path = path.absolute()
    own = next((one for one in sources if one.path is not None and Path(one.path).absolute() == path), None)
    if own is not None:
        return own.model_copy(update={"limit": None, "weight": 1.0})
    source = _with_columns(DataSource(path=path), sources, try_open)
    return _with_image_root(source, sources, try_open)


def _with_columns(source: DataSource, sources: Sequence[DataSource], try_open: TryOpen) -> DataSource:
    named = next((one for one in sources if one.columns), None)
    if named is None or _columns_of(source, try_open) is not None:
        return source
    columns = {"format": named.format, "columns": named.columns, "box_unit": named.box_unit}
    with_columns = source.model_copy(update=columns)
    has_them = {*named.columns.values()} <= {*(_columns_of(with_columns, try_open) or ())}
    return with_columns if has_them else source


def _with_image_root(source: DataSource, sources: Sequence[DataSource], try_open: TryOpen) -> DataSource:
    for root in dict.fromkeys((None, *map(_image_folder, sources))):
        rooted = source.model_copy(update={"image_root": root})
        if _has_first_sample(rooted, try_open):
            return rooted
    return source


def _image_folder(source: DataSource) -> Path | None:
    if source.image_root is not None or source.path is None:
        return source.image_root
    return Path(source.path).parent


def _columns_of(source: DataSource, try_open: TryOpen) -> tuple[str, ...] | None:
    """Return the columns of a source; None if it cannot be opened."""
    try:
        return try_open(source).columns
    except UserError:
        return None


def _has_first_sample(source: DataSource, try_open: TryOpen) -> bool:
    """Whether the first row of a source can be read, and its images are there."""
    try:
        opened = try_open(source)
        return any(opened.sample(0, raw) is not None for raw in islice(opened.stream(), 1))
    except UserError:
        return False
