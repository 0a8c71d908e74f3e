"""A source of numbered rows, for tests about their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flamingo_ft.data.sample import Sample
from flamingo_ft.errors import UserError


@dataclass
class Numbers:
    """A source whose row i is the number i; those in ``bad`` cannot be read."""

    count: int
    indexed: bool = True
    name: str = "numbers"
    bad: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.count

    def raw(self, i: int) -> Any:
        return i

    def stream(self) -> Iterator[Any]:
        return iter(range(self.count))

    def where(self, raw: int) -> str:
        return f"{self.name}: row {raw}"

    def sample(self, i: int, raw: Any) -> Sample:
        if raw in self.bad:
            raise UserError(f"{self.name}: row {i}: expected a number, got nothing; remove the row")
        content = [{"type": "text", "text": str(raw)}]
        return Sample([{"role": "document", "content": content}], [], "numbers", f"{self.name}: row {i}")
