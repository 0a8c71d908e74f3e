"""Error messages of other packages without anything about the user: no paths, names or tokens."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path, PurePath

_PATH = re.compile(r"(?<![\w.<])(?:~|[A-Za-z]:)?(?:[\\/][^\s\\/:'\",;()\[\]<>]+)+[\\/]?")
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|glpat)[_-][A-Za-z0-9_-]{8,}")
_SHORTEST_NAME = 3  # characters; a shorter one stands in too many words
LONGEST = 300


def anonymous(text: str) -> str:
    """The text on one line. Of a file only its name stays."""
    text = " ".join(text.split())[-LONGEST:]
    folders = {str(Path.home()), str(Path.cwd()), sys.prefix, sys.base_prefix} - {"/"}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, "/_")  # they may have spaces, at which a path seems to end
    text = _TOKEN.sub("<token>", _PATH.sub(_file_name, text))
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text


def _file_name(found: re.Match[str]) -> str:
    name = PurePath(found[0].replace("\\", "/")).name
    return name if "." in name else "<path>"


def _names() -> list[str]:
    """What the user and the machine are called."""
    names = [os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")] + [
        Path.home().name,
        platform.node(),
    ]
    return [name for name in names if len(name) >= _SHORTEST_NAME]
