"""A loss or a gradient that is no number: the step is not taken, and what caused it is named.

Both are looked at once per optimizer step, together, between the backward pass and the step: one wait for the device.
Several processes agree on what they saw, since what is wrong in one of them may not show in the others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from flamingo_ft.data.stream.batches import BatchContents
from flamingo_ft.errors import UserError

from .in_backward import inside_backward
from .non_finite_cause import cause_in

MOST_IN_A_ROW = 10  # steps left out one after another; more of them are no accident
NAMED = 8  # samples that a message names
SKIPPED = "skipped_steps"  # the log's key for how many steps were left out so far


class Finite:
    """Watches the losses and the gradient of each step of a trainer.

    skips: leave a bad step out, parameters and optimizer state as they were, where it would otherwise end the run.
    """

    def __init__(self, skips: bool = False):
        self.skips = skips
        self.in_a_row = 0
        self._batches: list[tuple[dict[str, Any], BatchContents]] = []
        self._losses: list[Tensor] = []
        self._good: Tensor | None = None

    def begin(self, batches: Sequence[dict[str, Any]], contents: Sequence[BatchContents]) -> None:
        """A step is about to be taken over ``batches``."""
        self._batches, self._losses = list(zip(batches, contents, strict=True)), []

    def note(self, loss: Tensor) -> Tensor:
        """Remember the loss of a batch; returns what to log of it: the last good one where a bad one may be skipped."""
        self._losses.append(loss)
        if not self.skips:
            return loss
        good = torch.zeros_like(loss) if self._good is None else self._good
        self._good = torch.where(loss.isfinite(), loss, good)
        return self._good

    def check_loss(self, trainer: Any, loss: Tensor) -> None:
        """Before a backward pass that steps by itself: UserError for a loss that is no number."""
        if not math.isfinite(loss.item()):
            self._stop(trainer, [True], loss.item(), "loss")

    def check(self, trainer: Any, norm: Tensor | float) -> None:
        """Before the step: UserError where a loss or the gradient's norm is no number, or the gradients are dropped."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        seen = torch.stack([value.to(trainer.args.device).float() for value in (norm, *self._losses)])
        everywhere = trainer.accelerator.gather(seen[None]).tolist()  # a row from each process
        norms, losses = [row[0] for row in everywhere], [loss for row in everywhere for loss in row[1:]]
        bad_loss = next((loss for loss in losses if not math.isfinite(loss)), None)
        bad_norm = (
            None if _overflowed(trainer) else next((one for one in norms if not math.isfinite(one)), None)
        )
        if bad_loss is None and bad_norm is None:
            self.in_a_row = 0
            return
        own = [not math.isfinite(loss) for loss in everywhere[trainer.args.process_index][1:]]
        value, what = (bad_loss, "loss") if bad_loss is not None else (bad_norm, "gradient's norm")
        self.in_a_row += 1
        if not self.skips or self.in_a_row >= MOST_IN_A_ROW:
            self._stop(trainer, own, value, what)
        self._leave_out(trainer, own, value, what)

    def _leave_out(self, trainer: Any, bad: list[bool], value: float, what: str) -> None:
        trainer.optimizer.zero_grad()  # without gradients a step changes neither parameters nor state
        rows = _rows(self._batches, bad)
        print(
            f"step {trainer.state.global_step + 1} left out, its {what} is {value}: {_named(rows)}",
            file=sys.stderr,
        )
        trainer.log({SKIPPED: skipped_steps(trainer.state.log_history) + 1})

    def _stop(self, trainer: Any, bad: list[bool], value: float, what: str) -> None:
        """Raise what is wrong, found by computing the batches once more."""
        finding = cause_in(trainer, [batch for batch, _ in self._batches])
        rows = _rows(
            self._batches, bad if finding is None else [place == finding[0] for place in range(len(bad))]
        )
        found = gather_object([(not any(bad), _named(rows), None if finding is None else finding[1])])
        found.sort(
            key=lambda one: one[0]
        )  # own bad losses first: gradients may be bad in all, having been added up
        samples, cause = next(
            (one[1:] for one in found if one[2]), (found[0][1], "not seen when computed once more")
        )
        again = f" for the {self.in_a_row}th time in a row" if self.skips else ""
        raise UserError(
            f"training: {what} is {value} at step {trainer.state.global_step + 1}{again}; {samples}: {cause}; {_remedy(trainer)}"
        )


def skipped_steps(log: Sequence[dict[str, Any]]) -> int:
    """How many steps a run left out, by its log, which goes on where a run does."""
    return max((entry.get(SKIPPED, 0) for entry in log), default=0)


def skipped_record(log: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What ``metrics.json`` says of them, where there are any."""
    return {SKIPPED: skipped_steps(log)} if skipped_steps(log) else {}


def _overflowed(trainer: Any) -> bool:
    """Whether a bad gradient may be the doing of the scaled loss: the scaler leaves such steps out, and scales less."""
    scaler = trainer.accelerator.scaler
    return scaler is not None and scaler.get_scale() >= 1


def _rows(batches: Sequence[tuple[Any, BatchContents]], bad: Sequence[bool]) -> list[str]:
    """Where the samples of the bad batches are; of all, where none is known to be."""
    chosen = [contents for (_, contents), is_bad in zip(batches, bad, strict=False) if is_bad]
    return [row for contents in chosen or [contents for _, contents in batches] for row in contents.rows]


def _named(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"trained on {', '.join(rows[:NAMED])}{more}"


def _remedy(trainer: Any) -> str:
    if trainer.args.fp16:
        return "float16 has no larger numbers: use train.precision=fp32, or bf16 on a GPU that has it"
    skip = "" if inside_backward(trainer.optimizer) else ", or train.non_finite=skip_step"
    return f"lower train.learning_rate, look at these samples{skip}"
