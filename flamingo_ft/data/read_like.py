"""Read a data file as the run of an adapter read its own: with the columns that its recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flamingo_ft.config import DataSource, load_recipe
from flamingo_ft.errors import UserError


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


def read_like(
    path: Path, sources: Sequence[DataSource], try_open: Callable[[DataSource], object]
) -> DataSource:
    """Return a file as a source.

    One of ``sources`` is read whole, with its own settings. A file whose columns no format has gets the
    format and columns of the first source that names columns.

    Args:
        try_open: opens a source. Raises UserError if it cannot be read.
    """
    path = path.absolute()
    own = next((one for one in sources if one.path is not None and Path(one.path).absolute() == path), None)
    if own is not None:
        return own.model_copy(update={"limit": None, "weight": 1.0})
    source = DataSource(path=path)
    named = next((one for one in sources if one.columns), None)
    if named is None:
        return source
    try:
        try_open(source)
    except UserError:
        columns = {"format": named.format, "columns": named.columns, "box_unit": named.box_unit}
        return source.model_copy(update=columns)
    return source
