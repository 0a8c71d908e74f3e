"""What a file of rows is to a source, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol


class RawRow(NamedTuple):
    """A row as it stands in its file, and which it is: enough to parse it, and to say where it came from."""

    file: int  # which of the source's files
    row: int  # its number in that file
    content: Any


class Rows(Protocol):
    """The rows of one file, read as late as possible. Picklable; files are opened anew where it is unpickled."""

    name: str
    """What errors call it."""
    indexed: bool
    """Whether rows can be had by number; else `stream` alone may be called."""

    def __len__(self) -> int: ...

    def content(self, row: int) -> Any:
        """A row, unparsed where parsing may fail."""
        ...

    def stream(self) -> Iterator[Any]:
        """The same, of every row in order, in constant memory."""
        ...

    def parse(self, content: Any, where: str) -> Any:
        """The row's value, mostly a mapping. UserError, beginning with ``where``, when it is malformed."""
        ...

    def find(self, key: str) -> Mapping[str, Any] | None:
        """The row with that key, in files that name their rows."""
        ...
