"""log.jsonl: every entry of the training log, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flamingo_ft import atomic

LOG_FILE = "log.jsonl"

Entry = dict[str, Any]  # flat scalars; "step" is the optimizer step


class LogFile(TrainerCallback):
    """Append each log entry to the file. A resumed run first restores the entries up to its checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            write_log(self.folder, state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(_lines(state.log_history[-1:]))


def write_log(folder: Path, entries: Iterable[Entry]) -> None:
    """Replace the file with these entries."""
    atomic.write_text(folder / LOG_FILE, _lines(entries))


def read_log(folder: Path) -> list[Entry]:
    """Return all entries. A last line without a line break, left by a killed process, is ignored."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _lines(entries: Iterable[Entry]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
