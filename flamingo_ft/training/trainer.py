"""TRL's SFT, DPO and KTO trainers, with our batches, evaluation, non-finite checks and checkpoints."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerState
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from flamingo_ft import processes
from flamingo_ft.adapters.trainable import frozen_copy, match_training_mode, zero_dropout
from flamingo_ft.backbones.cpu_attention import float32_attention_on_cpu
from flamingo_ft.data.batches import BatchContents, Batches
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.sharding import is_sharded

from .checkpoint_folders import read_manifest
from .checkpoints import (
    TRAINER_FOLDER,
    CheckpointPolicy,
    load_sharded_optimizer,
    restore_checkpoint,
    save_checkpoint,
    save_sharded_optimizer,
)
from .compat import TRAINER_STATE_NAME, ExportableState
from .eval_batches import EvalBatches
from .evaluation import run_evaluation
from .interruptions import StopOnSignal, oom_as_user_error
from .monitoring import ThroughputMeter, gate_values, learning_rates
from .non_finite import NonFiniteGuard
from .optimizer import find_in_backward_optimizer, recompute_learning_rates

if TYPE_CHECKING:
    TrainerBase = SFTTrainer
else:
    TrainerBase = object  # TRL's trainers come with the concrete ones


class FlamingoTrainerMixin(TrainerBase):
    """What every training method adds to TRL's trainer. Must precede it in the list of base classes.

    pending: contents of this optimizer step's batches that are still to be trained on, the next one first.
    current: contents of the batch in training, or of the last one. counts: samples, label tokens and images
    since the last log entry. earlier_seconds: training time before the last resume.
    """

    model: FlamingoForConditionalGeneration  # pyrefly: ignore[bad-override-mutable-attribute]
    optimizer: torch.optim.Optimizer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        batches: Batches,
        checkpoint_policy: CheckpointPolicy,
        non_finite: str = "stop",
        **arguments: Any,
    ):
        # TRL inspects the datasets for image columns; the rows themselves come from `batches` and
        # `eval_batches`.
        columns = Dataset.from_list([{"messages": [], "images": []}])
        super().__init__(train_dataset=columns, eval_dataset=columns, **arguments)
        self.batches, self.checkpoint_policy = batches, checkpoint_policy
        self.earlier_seconds, self._start_time = 0.0, time.monotonic()
        self.pending: list[BatchContents] = []
        self.current: BatchContents | None = None
        self.counts: Counter = Counter()
        self.meter = ThroughputMeter()
        self.eval_batches: EvalBatches | None = None
        self.scores_fn: Callable[[], dict[str, float]] | None = None
        self.non_finite_guard = NonFiniteGuard(skip=non_finite == "skip_step")

    # --- data and evaluation ---

    def get_train_dataloader(self) -> Batches:  # pyrefly: ignore[bad-override]
        """Return the endless training batches; ``max_steps`` ends the run."""
        return self.batches

    def set_eval(self, eval_batches: EvalBatches, scores_fn: Callable[[], dict[str, float]] | None) -> None:
        """Set what evaluations measure: the loss of ``eval_batches`` and other metrics, by name."""
        self.eval_batches, self.scores_fn = eval_batches, scores_fn

    def get_eval_dataloader(self, *_: Any) -> EvalBatches:  # pyrefly: ignore[bad-override]
        """Return the held-out batches, each with its weight in the mean loss."""
        assert self.eval_batches is not None  # Trainer asks only if the recipe has eval.steps
        return self.eval_batches

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return loss and metrics on the held-out samples."""
        with self.meter.paused(), oom_as_user_error("evaluation"):
            metrics = run_evaluation(self, self.get_eval_dataloader(), self.scores_fn)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on the trainer's device, as Trainer prepares it for `compute_loss`."""
        return self._prepare_inputs(dict(inputs))

    # --- one optimizer step ---

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Draw the batches of one optimizer step; a bad row in one process raises in all of them."""
        self.batches.contents.clear()
        with processes.raise_together():
            drawn = list(itertools.islice(epoch_iterator, num_batches))
        samples = super().get_batch_samples(iter(drawn), num_batches, device)
        self.pending = list(self.batches.contents)
        self.non_finite_guard.start_step(samples[0], self.pending)
        return samples

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Run forward and backward of one batch; return the loss to log."""
        self.current = self.pending.pop(0)
        with float32_attention_on_cpu():
            loss = super().training_step(*arguments, **options)
        self.counts.update(
            samples=len(self.current.rows),
            label_tokens=self.current.label_tokens,
            images=self.current.images,
        )
        return self.non_finite_guard.record_loss(loss)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Return the method's loss; check it here if the optimizer steps inside the backward pass."""
        loss = super().compute_loss(*arguments, **options)
        if torch.is_grad_enabled() and find_in_backward_optimizer(self.optimizer) is not None:
            self.non_finite_guard.check_loss(self, cast(torch.Tensor, loss))
        return loss

    def _get_grad_norm(self, *arguments: Any, **options: Any) -> torch.Tensor | float:
        """Return the gradient's norm and check it: this is Trainer's only hook between backward and step.

        If the optimizer steps inside the backward pass, it is the norm of the gradients that were used.
        """
        in_backward = find_in_backward_optimizer(self.optimizer)
        if in_backward is None:
            norm = super()._get_grad_norm(*arguments, **options)
        else:
            norm = in_backward.pop_grad_norm()
        self.non_finite_guard.check_step(self, norm)
        return norm

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Generator[None]:
        """Accumulate gradients of a sharded model locally until the last batch of a step.

        Trainer's own version reads a `distributed_config` that only transformers' own sharding leaves on a
        model.
        """
        model = cast(FSDPModule, self.model)
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    # --- the run as a whole ---

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint or from scratch; if no step is left, only restore."""
        self._start_time = time.monotonic()
        self.meter.reset()
        if checkpoint is not None and self._has_no_steps_left(checkpoint):
            # Trainer would train one more step.
            restore_checkpoint(self, checkpoint)
            self.state = _saved_state(checkpoint / TRAINER_FOLDER)
        else:
            folder = None if checkpoint is None else str(checkpoint / TRAINER_FOLDER)
            self.train(resume_from_checkpoint=folder)

    def _has_no_steps_left(self, checkpoint: Path) -> bool:
        """Return whether training was finished at this checkpoint and ``max_steps`` does not extend it."""
        state = _saved_state(checkpoint / TRAINER_FOLDER)
        was_finished = read_manifest(checkpoint)["ended"] and self.args.max_steps <= state.max_steps
        return was_finished or state.global_step >= self.args.max_steps

    def is_finished(self) -> bool:
        """Return whether training is over; a run stopped by a signal is not."""
        interrupted = any(
            callback.signal is not None
            for callback in self.callback_handler.callbacks
            if isinstance(callback, StopOnSignal)
        )
        stopped_early = self.control.should_training_stop and not interrupted
        return self.state.global_step >= self.state.max_steps or stopped_early

    def seconds(self) -> float:
        """Return the training time so far, in seconds, including the time before the last resume."""
        return self.earlier_seconds + time.monotonic() - self._start_time

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log an entry; add throughput, memory, gates and learning rates to entries about training."""
        if "loss" in logs:
            logs["seconds"] = round(self.seconds(), 1)
            logs |= self.meter.read(self.counts) | gate_values(self.model)
            logs |= learning_rates(self.optimizer, logs.get("learning_rate", 0.0))
        # Trainer would count the endless loader as one epoch; None for a stream.
        self.state.epoch = self.batches.epoch  # pyrefly: ignore[bad-assignment]
        with self.meter.paused():
            super().log(logs, *arguments, **options)

    # --- checkpoints: Trainer's private methods, because its public ones know only its own format ---

    def unwrapped_model(self) -> FlamingoForConditionalGeneration:
        """Return the model without accelerate's wrapper."""
        return cast(FlamingoForConditionalGeneration, self.accelerator.unwrap_model(self.model))

    def save_trainer_files(self, folder: Path) -> None:
        """Write optimizer, schedule, loss scale, random states and trainer state, in every process."""
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if processes.is_main():
            states: Any = self.state.stateful_callbacks  # declared as a list, but a dictionary by now
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    states[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.paused():
            save_checkpoint(self)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            save_sharded_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_sharded(self.model):
            load_sharded_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and _saved_state(Path(checkpoint)).max_steps != self.args.max_steps:
            recompute_learning_rates(self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_checkpoint(self, Path(resume_from_checkpoint).parent)

    def _init_training_state(self, max_steps: int, *arguments: Any, **options: Any) -> tuple[int, int]:
        progress = super()._init_training_state(max_steps, *arguments, **options)
        # This run's logging and saving steps, not those of the checkpoint.
        self.state.compute_steps(self.args, max_steps)
        return progress


class FlamingoTrainer(FlamingoTrainerMixin, SFTTrainer):
    """Supervised fine-tuning."""

    def score_labels(self, inputs: Mapping[str, Any]) -> Any:
        """Return TRL's fused output on a batch: ``log_probs`` (B, T - 1), zero where there is no label."""
        return self.model(**inputs, use_cache=False, fused_lm_head=True)


class WithReference(FlamingoTrainerMixin):
    """A trainer that compares the model with a frozen copy of the initial one. Dropout is off in both."""

    ref_model: torch.nn.Module

    def __init__(self, *positional: Any, model: FlamingoForConditionalGeneration, **arguments: Any):
        zero_dropout(model)
        super().__init__(*positional, model=model, ref_model=frozen_copy(model), **arguments)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        match_training_mode(self.ref_model, self.model.training)
        with checkpointing_name_warning_ignored():
            return super().compute_loss(*arguments, **options)


class FlamingoDpoTrainer(WithReference, DPOTrainer):
    """Direct preference optimization (arXiv:2305.18290)."""


class FlamingoKtoTrainer(WithReference, KTOTrainer):
    """Kahneman-Tversky optimization (arXiv:2402.01306)."""


@contextmanager
def checkpointing_name_warning_ignored() -> Generator[None]:
    """Ignore the warnings that TRL 1.16 uses transformers' old names for activation checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield


def _saved_state(trainer_folder: Path) -> TrainerState:
    """Load the trainer state from the ``training`` folder of a checkpoint."""
    return TrainerState.load_from_json(str(trainer_folder / TRAINER_STATE_NAME))
