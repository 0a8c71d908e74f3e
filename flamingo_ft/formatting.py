"""How numbers, durations, sizes and other libraries' messages are written for users.

Used by the command line, reports, error messages and cards alike, so that one quantity looks the same
everywhere.
"""

from __future__ import annotations

import base64

MIB, GIB = 2**20, 2**30  # bytes
MAX_MESSAGE_CHARACTERS = 200
MAX_PATH_CHARACTERS = 300


def one_line(text: object, limit: int | None = None) -> str:
    """Return ``text`` with every run of whitespace as one space, cut to ``limit`` characters."""
    return " ".join(str(text).split())[:limit]


def error_message(error: BaseException, limit: int | None = MAX_MESSAGE_CHARACTERS) -> str:
    """Return an exception's message on one line, or its type's name where it has none; to be quoted in a
    `UserError`."""
    return one_line(error, limit) or type(error).__name__


def shorten(text: object, limit: int = MAX_PATH_CHARACTERS) -> str:
    """Return ``text``, such as a path or URL, on one line and without what exceeds ``limit`` characters (it
    may hold data)."""
    line = str(text).replace("\n", "\\n")
    return line if len(line) <= limit else f"{line[:limit]}..."


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 row``, ``1,200 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(part: float | None, whole: float = 1, digits: int = 1) -> str:
    """Return ``part / whole`` as ``42.0 %``; an empty string if ``part`` is None or ``whole`` is 0."""
    return "" if part is None or not whole else f"{100 * part / whole:.{digits}f} %"


def significant(value: float, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits; large values as whole numbers: ``12,346``,
    ``0.0123``."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def gib(size: float) -> str:
    """Return a size in bytes as a number of GiB, without the unit: ``12.34``, ``0.012``."""
    return f"{size / GIB:.{2 if size >= GIB else 3}f}"


def clock(seconds: float) -> str:
    """Return seconds as ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def duration(seconds: float) -> str:
    """Return seconds as ``1 h 2 min``, ``3 min 20 s`` or ``45 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """Return ``content`` as a data URI, which a page can hold in place of a file beside it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
