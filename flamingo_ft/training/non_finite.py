"""NaN or Inf in a loss or gradient: skip or stop, and name the samples and the module that caused it.

Loss and gradient norm are checked together once per optimizer step, between backward pass and step, so the
device is synchronized once. The values are gathered from all processes, because a bad one may occur in a
single process only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flamingo_ft.data.batches import BatchContents
from flamingo_ft.errors import UserError

from .compat import tree_leaves
from .optimizer import find_in_backward_optimizer

MAX_SKIPPED_IN_A_ROW = 10  # with that many consecutive bad steps, the run has diverged
MAX_NAMED_SAMPLES = 8  # in an error message
SKIPPED = "skipped_steps"  # log key: number of steps skipped so far


class NonFiniteGuard:
    """Checks the losses and the gradient norm of each step of a trainer.

    skip: skip a bad step, leaving parameters and optimizer state unchanged, instead of ending the run.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.bad_in_a_row = 0
        self._batches: list[tuple[dict[str, Any], BatchContents]] = []
        self._losses: list[Tensor] = []
        self._last_finite: Tensor | None = None

    def start_step(self, batches: Sequence[dict[str, Any]], contents: Sequence[BatchContents]) -> None:
        """Begin an optimizer step over ``batches``."""
        self._batches, self._losses = list(zip(batches, contents, strict=True)), []

    def record_loss(self, loss: Tensor) -> Tensor:
        """Record a batch's loss and return the loss to log: the last finite one if bad steps are skipped."""
        self._losses.append(loss)
        if not self.skip:
            return loss
        last = torch.zeros_like(loss) if self._last_finite is None else self._last_finite
        self._last_finite = torch.where(loss.isfinite(), loss, last)
        return self._last_finite

    def check_loss(self, trainer: Any, loss: Tensor) -> None:
        """Raise UserError for a non-finite loss, before a backward pass that also takes the step."""
        if not math.isfinite(loss.item()):
            self._stop(trainer, [True], loss.item(), "loss")

    def check_step(self, trainer: Any, norm: Tensor | float) -> None:
        """Raise UserError, or skip the coming step, if a loss or the gradient norm is non-finite."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        values = torch.stack([value.to(trainer.args.device).float() for value in (norm, *self._losses)])
        # One row (norm, losses...) per process.
        per_process = trainer.accelerator.gather(values[None]).tolist()
        bad_loss = _first_non_finite([loss for row in per_process for loss in row[1:]])
        bad_norm = (
            None if _is_scaler_overflow(trainer) else _first_non_finite([row[0] for row in per_process])
        )
        if bad_loss is None and bad_norm is None:
            self.bad_in_a_row = 0
            return
        own_bad = [not math.isfinite(loss) for loss in per_process[trainer.args.process_index][1:]]
        value, what = (bad_loss, "loss") if bad_loss is not None else (bad_norm, "gradient norm")
        self.bad_in_a_row += 1
        if not self.skip or self.bad_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self._stop(trainer, own_bad, value, what)
        self._skip_step(trainer, own_bad, value, what)

    def _skip_step(self, trainer: Any, bad: list[bool], value: float, what: str) -> None:
        trainer.optimizer.zero_grad()  # without gradients the step changes neither parameters nor state
        samples = _name_samples(_source_rows(self._batches, bad))
        print(
            f"step {trainer.state.global_step + 1} skipped, its {what} is {value}: {samples}", file=sys.stderr
        )
        trainer.log({SKIPPED: count_skipped_steps(trainer.state.log_history) + 1})

    def _stop(self, trainer: Any, bad: list[bool], value: float, what: str) -> None:
        """Raise UserError with the cause, found by computing the batches once more."""
        diagnosis = diagnose(trainer, [batch for batch, _ in self._batches])
        bad_here, cause = bad, None
        if diagnosis is not None:
            bad_index, cause = diagnosis
            bad_here = [index == bad_index for index in range(len(bad))]
        samples = _name_samples(_source_rows(self._batches, bad_here))
        reports = gather_object([(not any(bad), samples, cause)])
        # Processes with a bad loss first: the reduced gradient is bad in all of them.
        reports.sort(key=lambda report: report[0])
        samples, cause = next(
            ((samples, cause) for _, samples, cause in reports if cause),
            (reports[0][1], "not reproduced when computed once more"),
        )
        again = f" for the {self.bad_in_a_row}th time in a row" if self.skip else ""
        raise UserError(
            f"training: {what} is {value} at step {trainer.state.global_step + 1}{again}; "
            f"{samples}: {cause}; {_remedy(trainer)}"
        )


def count_skipped_steps(log: Sequence[dict[str, Any]]) -> int:
    """Return the number of skipped steps from a run's log, which a resumed run continues."""
    return max((entry.get(SKIPPED, 0) for entry in log), default=0)


def _first_non_finite(values: Sequence[float]) -> float | None:
    return next((value for value in values if not math.isfinite(value)), None)


def _is_scaler_overflow(trainer: Any) -> bool:
    """Return whether loss scaling may have caused a bad gradient; the scaler then skips the step itself."""
    scaler = trainer.accelerator.scaler
    return scaler is not None and scaler.get_scale() >= 1


def _source_rows(batches: Sequence[tuple[Any, BatchContents]], bad: Sequence[bool]) -> list[str]:
    """Return the source rows of the bad batches' samples, or of all batches' if none is known to be bad."""
    chosen = [contents for (_, contents), is_bad in zip(batches, bad, strict=False) if is_bad]
    return [row for contents in chosen or [contents for _, contents in batches] for row in contents.rows]


def _name_samples(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - MAX_NAMED_SAMPLES} more" if len(rows) > MAX_NAMED_SAMPLES else ""
    return f"trained on {', '.join(rows[:MAX_NAMED_SAMPLES])}{more}"


def _remedy(trainer: Any) -> str:
    if trainer.args.fp16:
        return "float16 overflows above 65,504: use train.precision=fp32, or bf16 on a GPU that supports it"
    skip = "" if find_in_backward_optimizer(trainer.optimizer) else ", or set train.non_finite=skip_step"
    return f"lower train.learning_rate, look at these samples{skip}"


# --- the cause ---


def diagnose(trainer: Any, batches: Sequence[dict[str, Any]]) -> tuple[int, str] | None:
    """Return the index of the first bad batch and what is non-finite in it; None if all is finite now.

    The cause is the first module whose output is non-finite or, if all outputs are finite, the first
    non-finite gradient. Every batch is computed in any case: all processes must run the same number of
    forward passes.
    """
    causes = [_find_cause(trainer, batch) for batch in batches]
    return next(((index, cause) for index, cause in enumerate(causes) if cause), None)


def _find_cause(trainer: Any, batch: dict[str, Any]) -> str | None:
    model = trainer.model
    inputs = trainer.prepare_inputs(batch)
    causes = [f"{name} of the batch is not finite" for name, value in inputs.items() if not is_finite(value)]
    model.zero_grad(set_to_none=True)
    # With an optimizer that steps inside the backward pass, a backward pass would change the parameters.
    backward = find_in_backward_optimizer(trainer.optimizer) is None
    with (
        _record_causes(model, causes),
        torch.set_grad_enabled(backward),
        trainer.compute_loss_context_manager(),
    ):
        loss = trainer.compute_loss(model, inputs)
        if backward:
            loss.backward()
    return causes[0] if causes else None


@contextmanager
def _record_causes(model: nn.Module, causes: list[str]) -> Generator[None]:
    """Append the first non-finite output or gradient of ``model`` to ``causes``, unless it has an entry."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(_output_hook(name, causes))
            stack.callback(handle.remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(_gradient_hook(name, causes))
                stack.callback(handle.remove)
        yield


def _output_hook(name: str, causes: list[str]) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        if causes or is_finite(output):
            return
        parameters = module.named_parameters(recurse=False)
        bad_weight = next((key for key, parameter in parameters if not is_finite(parameter)), None)
        weights = f", whose {bad_weight} is not finite" if bad_weight else ""
        causes.append(f"the first output that is not finite is that of {name or 'the model'}{weights}")

    return hook


def _gradient_hook(name: str, causes: list[str]) -> Any:
    def hook(parameter: nn.Parameter) -> None:
        if not causes and not is_finite(parameter.grad):
            causes.append(f"all outputs are finite, and the first gradient that is not is that of {name}")

    return hook


def is_finite(value: Any) -> bool:
    """Return whether all floating-point tensors in a nested structure are finite.

    Only this process's shard of a sharded tensor is checked: gathering it would need every process, and only
    some of them call this.
    """
    leaves = tree_leaves(dict(value) if hasattr(value, "keys") else value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return all(bool(tensor.isfinite().all()) for tensor in local)
