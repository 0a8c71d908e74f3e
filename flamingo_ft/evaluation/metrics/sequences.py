"""Longest common subsequence and edit distance, with a row of the table as the bits of an integer.

Python's integers are as long as needed, so one step per element of the second sequence is enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence (Hyyrö, 2004)."""
    positions, full = _positions(first), (1 << len(first)) - 1
    row = full  # bit i is 0 where the length grows at element i of `first`
    for element in second:
        matches = row & positions.get(element, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions (Myers, 1999; Hyyrö, 2003)."""
    if not first:
        return len(second)
    positions, full, last = _positions(first), (1 << len(first)) - 1, 1 << (len(first) - 1)
    up, down, distance = full, 0, len(first)  # where the distance grows, or falls, from one row to the next
    for element in second:
        equal = positions.get(element, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        grows, falls = down | (full & ~(diagonal | up)), up & diagonal  # from one column to the next
        distance += bool(grows & last) - bool(falls & last)
        grows, falls = (grows << 1) | 1, falls << 1
        up, down = (falls | ~(diagonal | grows)) & full, grows & diagonal & full
    return distance


def _positions(sequence: Sequence[Hashable]) -> dict[Hashable, int]:
    """Return, for each element, an integer with a bit at every index where it stands."""
    positions: dict[Hashable, int] = {}
    for index, element in enumerate(sequence):
        positions[element] = positions.get(element, 0) | 1 << index
    return positions
