"""What every training method adds to TRL's trainer: batches that come ready made, an eye on what is in them, and
checkpoints that nothing spoils."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from flamingo_ft.data.stream.batches import Batches, Contents

from .checkpoints import TRAINING, Keeping, read_manifest, restore, save_checkpoint
from .meter import Meter, gates, learning_rates
from .stopping import Stopping


class Engine:
    """Mixed into a trainer of TRL's, before it.

    contents: of the batches of this step that were not trained on yet, the next one first. trained_on: the one that is
    trained on, or was last. counts: samples, label tokens and images since somebody set it back. keeping: how checkpoints
    are kept. seconds_before: of training before this process took over.
    """

    def __init__(self, batches: Batches, keeping: Keeping, **arguments: Any):
        # TRL looks at a dataset to learn that there are images in it; rows are drawn by `batches` alone.
        super().__init__(train_dataset=Dataset.from_list([{"messages": [], "images": []}]), **arguments)
        self.batches, self.keeping = batches, keeping
        self.seconds_before, self._began = 0.0, time.monotonic()
        self.contents: list[Contents] = []
        self.trained_on: Contents | None = None
        self.counts: Counter = Counter()
        self.meter = Meter()

    def get_train_dataloader(self) -> Batches:
        """Endless; the recipe's number of steps ends the run."""
        return self.batches

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The batches of one optimizer step."""
        self.batches.contents.clear()
        samples = super().get_batch_samples(*arguments, **options)
        self.contents = list(self.batches.contents)
        return samples

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Forward and backward of one batch."""
        self.trained_on = self.contents.pop(0)
        loss = super().training_step(*arguments, **options)
        rows, label_tokens, images = len(self.trained_on.rows), self.trained_on.label_tokens, self.trained_on.images
        self.counts.update(samples=rows, label_tokens=label_tokens, images=images)
        return loss

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from the first step or from a checkpoint; one that was written there is only restored."""
        self._began = time.monotonic()
        self.meter.start()
        if checkpoint is not None and read_manifest(checkpoint)["ended"]:
            restore(self, checkpoint)
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINING / TRAINER_STATE_NAME))
        else:  # Trainer would go on after the last step
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint / TRAINING))

    def ended(self) -> bool:
        """Whether training is over; one that a signal stops is not."""
        told = any(one.number is not None for one in self.callback_handler.callbacks if isinstance(one, Stopping))
        return self.state.global_step >= self.state.max_steps or (self.control.should_training_stop and not told)

    def seconds(self) -> float:
        """Of training so far, in this process and those before it."""
        return self.seconds_before + time.monotonic() - self._began

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        progress = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)  # as wished now, not as in the run that is gone on with
        return progress

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log an entry; one about training with what the meter reads."""
        if "loss" in logs:
            logs |= {"seconds": round(self.seconds(), 1)} | self.meter.read(self.counts) | gates(self.model)
            logs |= learning_rates(self.optimizer, logs.get("learning_rate", 0.0))
        with self.meter.paused():
            super().log(logs, *arguments, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.paused():
            save_checkpoint(self, self.keeping)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        restore(self, Path(folder).parent)
