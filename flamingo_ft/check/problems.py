"""The list of all problems, on disk as they are found: a million bad rows must not fill the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from .rows import Problem

FIRST = 20  # told on the terminal


class ProblemList:
    """A JSONL file of problems. first: the first `FIRST` of them."""

    def __init__(self, path: Path):
        self.path = path
        self.first: list[Problem] = []
        self.count = 0
        path.write_text("", encoding="utf-8")

    def add(self, problems: list[Problem]) -> None:
        if not problems:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(problem)) + "\n" for problem in problems)
        self.first += problems[: FIRST - len(self.first)]
        self.count += len(problems)

    def __iter__(self) -> Iterator[Problem]:
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                yield Problem(**json.loads(line))
