"""Samples and pictures that are there more than one time, and those that are both trained on and held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .numbers import Numbers

GROUPS, ROWS = 20, 5  # that are told of, and of each


@dataclass(frozen=True)
class Group:
    """Usable rows (numbers in `Numbers`) that have something in common: the first of them, and how many there are."""

    rows: list[int]
    times: int


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once.

    copies: training samples that equal an earlier one; groups of them. leaked: held-out samples that are trained on
    too. pictures: distinct ones; repeated: those in more than one place. leaked_pictures: held-out samples with a
    picture that is trained on too.
    """

    copies: int
    groups: list[Group]
    leaked: int
    leaked_groups: list[Group]
    pictures: int
    repeated: int
    repeated_groups: list[Group]
    leaked_pictures: int


def find_duplicates(numbers: Numbers, first_held_out: int) -> Duplicates:
    """Among all usable rows; parts from ``first_held_out`` on are held out."""
    content, held = numbers.column("content"), numbers.column("part") >= first_held_out
    rows = np.arange(len(content))
    trained, leaks = content[~held], held & np.isin(content, content[~held])
    pictures, of = numbers.column("picture"), numbers.column("of")
    held_picture = held[of] if len(of) else np.empty(0, bool)
    leaked_pictures = of[held_picture & np.isin(pictures, pictures[~held_picture])]
    distinct = np.unique(pictures, return_counts=True)[1]
    return Duplicates(
        copies=len(trained) - len(np.unique(trained)),
        groups=list(_groups(trained, rows[~held])),
        leaked=int(leaks.sum()),
        leaked_groups=list(_groups(content, rows, only=content[leaks])),
        pictures=len(distinct),
        repeated=int((distinct > 1).sum()),
        repeated_groups=list(_groups(pictures, of)),
        leaked_pictures=len(np.unique(leaked_pictures)),
    )


def _groups(keys: np.ndarray, rows: np.ndarray, only: np.ndarray | None = None) -> Iterator[Group]:
    """The largest groups of equal keys, of two of a size the earlier first; only: those with one of these keys."""
    order = np.argsort(keys, kind="stable")
    distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    wanted = np.flatnonzero(counts > 1 if only is None else np.isin(distinct, only))
    ranked = sorted(wanted.tolist(), key=lambda group: (-counts[group], rows[order[starts[group]]]))
    for group in ranked[:GROUPS]:
        members = rows[order[starts[group] : starts[group] + counts[group]]]
        yield Group(members[:ROWS].tolist(), int(counts[group]))
