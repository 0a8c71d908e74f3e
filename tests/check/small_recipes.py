"""Small recipes over data that a test writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flamingo_ft.backbones.language import NANO_FOLDER
from flamingo_ft.check.check_data import check_data
from flamingo_ft.check.check_report import CheckReport
from flamingo_ft.config import Recipe


def recipe(
    folder: Path, train: list, workers: int = 0, method: str = "sft", language: str = "nano", **data: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"vision": {"name": "nano"}, "language": {"name": language}},
            "data": {"train": train, **data},
            "train": {
                "output_dir": str(folder / "run"),
                "max_steps": 1,
                "num_workers": workers,
                "method": method,
            },
        }
    )


def checked(folder: Path, train: list, **options: Any) -> CheckReport:
    """Check `recipe` into ``folder`` / "check"."""
    return check_data(recipe(folder, train, **options), "test", folder / "check")


def write_rows(path: Path, rows: list) -> dict[str, str]:
    """Write a JSONL file and return its entry in a recipe; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return {"path": str(path)}


def language_without_weights(folder: Path, chat_template: str | None = None) -> str:
    """Copy the nano language model without its weights, with another chat template if one is given."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO_FOLDER / name, folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return str(folder)


def asked(question: str, answer: Any, images: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), **fields}


def problem_lines(folder: Path) -> list[str]:
    """Read problems.jsonl as lines in the form of error messages."""
    problems = [json.loads(line) for line in (folder / "check" / "problems.jsonl").read_text().splitlines()]
    lines = []
    for problem in problems:
        row = None if problem["row"] is None else f"row {problem['row']}"
        lines.append(
            ": ".join(part for part in (problem["file"], row, problem["field"], problem["problem"]) if part)
        )
    return lines
