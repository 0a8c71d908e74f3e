"""Read a data file as the run of an adapter read its own: with the columns that its recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from flamingo_ft.config import DataSource, load_recipe
from flamingo_ft.errors import UserError

from .schemas.columns import normalize_name
from .schemas.schema import UnknownColumns
from .sources import Source
from .sources.source import first_columns

TryOpen = Callable[[DataSource], Source]
OPTIONAL_FIELDS = ("task", "boxes", "system", "input", "answers")  # rows can be asked and scored without them


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
    format and columns of the first source that names columns which it has; optional ones (task) may be
    missing. Images that are not beside it are looked up where those of ``sources`` are.

    Args:
        try_open: opens a source. Raises UserError if it cannot be read.

    Raises:
        UnknownColumns: neither a format nor ``sources`` have the file's columns.
    """
    path = path.absolute()
    own = next((one for one in sources if one.path is not None and Path(one.path).absolute() == path), None)
    if own is not None:
        return own.model_copy(update={"limit": None, "weight": 1.0})
    source = _with_columns(DataSource(path=path), sources, try_open)
    return _with_image_root(source, sources, try_open)


def _with_columns(source: DataSource, sources: Sequence[DataSource], try_open: TryOpen) -> DataSource:
    named = [one for one in sources if one.columns]
    try:
        try_open(source)
        return source
    except UnknownColumns as error:
        unknown = UnknownColumns(f"{error.problem}; {_remedy(named)}", error.problem)
    except UserError:
        unknown = None
    with_columns = (_with_columns_of(source, one, try_open) for one in named)
    found = next((one for one in with_columns if one is not None), None)
    if found is None and unknown is not None:
        raise unknown
    return found or source


def _with_columns_of(source: DataSource, named: DataSource, try_open: TryOpen) -> DataSource | None:
    """Return the source with the format and columns of another; None if it lacks one that is not optional."""
    header = {*map(normalize_name, first_columns(source))}
    columns = {
        field: column
        for field, column in named.columns.items()
        if field not in OPTIONAL_FIELDS or normalize_name(column) in header
    }
    update = {"format": named.format, "columns": columns, "box_unit": named.box_unit}
    with_columns = source.model_copy(update=update)
    try:
        opened = {*map(normalize_name, try_open(with_columns).columns)}
    except UserError:
        return None
    return with_columns if {*map(normalize_name, columns.values())} <= opened else None


def _remedy(named: Sequence[DataSource]) -> str:
    """Return how to name the columns of a file: a run's recipe is not to be edited for it."""
    usual = "those of a format, such as image, question and answer (README.md, Your data)"
    if not named:
        return f"rename them to {usual}"
    columns = ", ".join(named[0].columns.values())
    return f"rename them to the columns of the run's data ({columns}), or to {usual}"


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


def _has_first_sample(source: DataSource, try_open: TryOpen) -> bool:
    """Whether the first row of a source can be read, and its images are there."""
    try:
        opened = try_open(source)
        return any(opened.sample(0, raw) is not None for raw in islice(opened.stream(), 1))
    except UserError:
        return False
