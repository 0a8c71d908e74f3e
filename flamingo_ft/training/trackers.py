"""Where the log goes beside the run's own files: transformers' own callbacks, each only where it was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError

# Set where the environment does not: what is measured stays on this machine, and so does all else.
LOCAL = {
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"},
}


def check_trackers(wanted: TrainSection) -> None:
    """UserError for one that is named but not installed, before anything is loaded."""
    for name in wanted.report_to:
        found = find_spec(name)
        if (
            found is None or found.origin is None
        ):  # a folder of that name, as they leave behind, is no package
            extra = "flamingo_ft" if name == "tensorboard" else f"flamingo_ft[{name}]"
            raise UserError(
                f"train.report_to: {name} is not installed; pip install '{extra}', or leave {name} out of the list"
            )


def tracker_callbacks(wanted: TrainSection) -> list[TrainerCallback]:
    """One for each name in ``train.report_to``. None sends anything anywhere unless the environment says so:
    WANDB_MODE=online, TRACKIO_SPACE_ID."""
    makers: dict[str, Callable[[], TrainerCallback]] = {
        "tensorboard": lambda: TensorBoard(wanted.output_dir / "tensorboard"),
        "trackio": TrackioCallback,
        "wandb": WandbCallback,
    }
    for name in wanted.report_to:
        for variable, value in LOCAL.get(name, {}).items():
            os.environ.setdefault(variable, value)
    if "wandb" in wanted.report_to:
        os.environ.setdefault("WANDB_DIR", str(wanted.output_dir))
    return [makers[name]() for name in wanted.report_to]


class TensorBoard(TensorBoardCallback):
    """Events in a folder of the run; where the run goes on, steps that are trained again replace those from before."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if state.is_world_process_zero:
            again = state.global_step + 1 if state.global_step else None
            self.tb_writer = SummaryWriter(log_dir=str(self.folder), purge_step=again)
        super().on_train_begin(args, state, control, **given)
