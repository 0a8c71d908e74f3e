"""Names on the Hugging Face Hub, wherever a path may stand: ``org/name``, ``org/name@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w.-][\w./-]*))?")


@dataclass(frozen=True)
class HubName:
    """A repository, and a commit, branch or tag of it; None is its main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def hub_name(place: str | Path) -> HubName | None:
    """What ``place`` names on the Hub; None for a path. What exists on this machine is always a path."""
    found = NAME.fullmatch(str(place))
    if found is None or Path(place).exists():
        return None
    return HubName(found["repository"], found["revision"])


def commit_of(path: Path) -> str | None:
    """The commit of what lies in the Hugging Face cache, ``.../snapshots/<commit>/...``; None elsewhere."""
    found = re.search(r"/models--[^/]+/snapshots/([^/]+)(/|$)", path.as_posix())
    return found[1] if found else None
