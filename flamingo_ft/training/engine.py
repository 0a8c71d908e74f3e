"""What every training method adds to TRL's trainer: batches that come ready made, an eye on what is in them, and
checkpoints that nothing spoils."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from flamingo_ft import processes
from flamingo_ft.data.stream.batches import BatchContents, Batches
from flamingo_ft.model.sharding import is_sharded

from .checkpoints import TRAINING, Keeping, load_parts, read_manifest, restore, save_checkpoint, save_parts
from .examination import Examination
from .held_out import HeldOut, judge
from .hub import Pushing
from .in_backward import inside_backward
from .meter import Meter, gates, learning_rates
from .non_finite import Finite
from .out_of_memory import oom_as_user_error
from .schedule import recompute_learning_rates
from .stopping import Stopping


class Engine:
    """Mixed into a trainer of TRL's, before it.

    contents: of the batches of this step that were not trained on yet, the next one first. trained_on: the one that is
    trained on, or was last. counts: samples, label tokens and images since the last entry of the log, which ``meter``
    reads. keeping: how checkpoints are kept. seconds_before: of training before this process took over.
    """

    def __init__(self, batches: Batches, keeping: Keeping, non_finite: str = "stop", **arguments: Any):
        # TRL looks at datasets to learn that there are images in them; rows come from `batches` and `held_out` alone.
        rows = Dataset.from_list([{"messages": [], "images": []}])
        super().__init__(train_dataset=rows, eval_dataset=rows, **arguments)
        self.batches, self.keeping = batches, keeping
        self.seconds_before, self._began = 0.0, time.monotonic()
        self.contents: list[BatchContents] = []
        self.trained_on: BatchContents | None = None
        self.counts: Counter = Counter()
        self.meter = Meter()
        self.held_out: HeldOut | None = None
        self.share_right: Callable[[], float] | None = None
        self.pushing: Pushing | None = None
        self.finite = Finite(skips=non_finite == "skip_step")

    def get_train_dataloader(self) -> Batches:
        """Endless; the recipe's number of steps ends the run."""
        return self.batches

    def judge_by(self, held_out: HeldOut, examination: Examination | None) -> None:
        """What evaluations during training go by: the loss of ``held_out``, the answers in an examination."""
        self.held_out = held_out
        self.share_right = None if examination is None else examination.share_right

    def get_eval_dataloader(self, *_: Any) -> HeldOut:
        """Every held-out sample once, with what its batch weighs in the mean."""
        return self.held_out

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and accuracy on the held-out samples."""
        with self.meter.paused(), oom_as_user_error("evaluation"):
            metrics = judge(self, self.get_eval_dataloader(), self.share_right)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_batch_samples(self, batches: Iterator, number: int, *arguments: Any) -> Any:
        """The batches of one optimizer step; a bad row of one process ends all."""
        self.batches.contents.clear()
        with processes.failing_together():
            drawn = list(itertools.islice(batches, number))
        samples = super().get_batch_samples(iter(drawn), number, *arguments)
        self.contents = list(self.batches.contents)
        self.finite.begin(samples[0], self.contents)
        return samples

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Forward and backward of one batch."""
        self.trained_on = self.contents.pop(0)
        loss = super().training_step(*arguments, **options)
        rows, label_tokens, images = (
            len(self.trained_on.rows),
            self.trained_on.label_tokens,
            self.trained_on.images,
        )
        self.counts.update(samples=rows, label_tokens=label_tokens, images=images)
        return self.finite.note(loss)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The method's own; looked at before the backward pass where that steps."""
        loss = super().compute_loss(*arguments, **options)
        if torch.is_grad_enabled() and inside_backward(self.optimizer) is not None:
            self.finite.check_loss(self, loss)
        return loss

    def _get_grad_norm(self, *arguments: Any, **options: Any) -> torch.Tensor | float:
        """The norm of the whole gradient, looked at before the step. Of steps inside the backward pass: of what was
        stepped with."""
        inside = inside_backward(self.optimizer)
        norm = super()._get_grad_norm(*arguments, **options) if inside is None else inside.take_norm()
        self.finite.check(self, norm)
        return norm

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from the first step or from a checkpoint; if no step is left, only restore that."""
        self._began = time.monotonic()
        self.meter.start()
        if checkpoint is not None and self._nothing_left(checkpoint):
            restore(self, checkpoint)
            self.state = _saved_state(checkpoint / TRAINING)
        else:  # Trainer would go on after the last step
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint / TRAINING))

    def _nothing_left(self, checkpoint: Path) -> bool:
        """Whether training had ended at this checkpoint and is not extended by a larger number of steps."""
        state = _saved_state(checkpoint / TRAINING)
        ended = read_manifest(checkpoint)["ended"] and self.args.max_steps <= state.max_steps
        return ended or state.global_step >= self.args.max_steps

    def ended(self) -> bool:
        """Whether training is over; one that a signal stops is not."""
        told = any(
            one.number is not None for one in self.callback_handler.callbacks if isinstance(one, Stopping)
        )
        return self.state.global_step >= self.state.max_steps or (
            self.control.should_training_stop and not told
        )

    def seconds(self) -> float:
        """Of training so far, in this process and those before it."""
        return self.seconds_before + time.monotonic() - self._began

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        progress = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(
            self.args, max_steps
        )  # as wished now, not as in the run that is gone on with
        return progress

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log an entry; one about training with what the meter reads."""
        if "loss" in logs:
            logs |= {"seconds": round(self.seconds(), 1)} | self.meter.read(self.counts) | gates(self.model)
            logs |= learning_rates(self.optimizer, logs.get("learning_rate", 0.0))
        self.state.epoch = self.batches.epoch  # Trainer's own counts an endless loader as one epoch
        with self.meter.paused():
            super().log(logs, *arguments, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.paused():
            folder = save_checkpoint(self, self.keeping)
            if self.pushing is not None:
                self.pushing.push_checkpoint(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            save_parts(self.optimizer, self.lr_scheduler, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_sharded(self.model):
            load_parts(self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and _saved_state(Path(checkpoint)).max_steps != self.args.max_steps:
            recompute_learning_rates(self.lr_scheduler)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Gradients of a sharded model are added up where they are until the last batch of a step."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        restore(self, Path(folder).parent)


def _saved_state(training: Path) -> TrainerState:
    """The trainer's state in the ``training`` folder of a checkpoint."""
    return TrainerState.load_from_json(str(training / TRAINER_STATE_NAME))
