"""Small recipes over data that a test writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flamingo_ft.check.check_data import check_data
from flamingo_ft.check.check_report import CheckReport
from flamingo_ft.config import Recipe


def recipe(folder: Path, train: list, workers: int = 0, method: str = "sft", **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"vision": {"name": "nano"}, "language": {"name": "nano"}},
            "data": {"train": train, **data},
            "train": {
                "output_dir": str(folder / "run"),
                "max_steps": 1,
                "num_workers": workers,
                "method": method,
            },
        }
    )


def checked(folder: Path, train: list, workers: int = 0, method: str = "sft", **data: Any) -> CheckReport:
    """What a check finds, its files being in ``folder`` / "check"."""
    return check_data(recipe(folder, train, workers, method, **data), "test", folder / "check")


def write_rows(path: Path, rows: list) -> dict[str, str]:
    """A JSONL file, as an entry of a recipe; a row that is text already stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return {"path": str(path)}


def asked(question: str, answer: Any, images: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), **fields}


def problem_lines(folder: Path) -> list[str]:
    """The lines of problems.jsonl, as error messages have them."""
    problems = [json.loads(line) for line in (folder / "check" / "problems.jsonl").read_text().splitlines()]
    lines = []
    for problem in problems:
        row = None if problem["row"] is None else f"row {problem['row']}"
        lines.append(
            ": ".join(part for part in (problem["file"], row, problem["field"], problem["problem"]) if part)
        )
    return lines
