"""Where numbers go bad: the first module whose output is no number or, where all are, the first such gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from .in_backward import inside_backward


def cause_in(trainer: Any, batches: Sequence[dict[str, Any]]) -> tuple[int, str] | None:
    """The place of the first bad one of ``batches``, and what is wrong there; None where nothing is, this time.

    All of them are computed, whatever is found: several processes have to compute the same number of times.
    """
    found = [_cause_in(trainer, batch) for batch in batches]
    return next(((place, cause) for place, cause in enumerate(found) if cause), None)


def _cause_in(trainer: Any, batch: dict[str, Any]) -> str | None:
    model, causes = trainer.model, []
    inputs = trainer._prepare_inputs(batch)
    causes += [f"{name} of the batch is not finite" for name, value in inputs.items() if not is_finite(value)]
    model.zero_grad(set_to_none=True)
    steps = inside_backward(trainer.optimizer) is not None
    with _watched(model, causes), torch.set_grad_enabled(not steps), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs)
        if not steps:
            loss.backward()
    return causes[0] if causes else None


@contextmanager
def _watched(model: nn.Module, causes: list[str]) -> Iterator[None]:
    """Notes what goes bad in ``model``, in the order in which it does."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(_output_watcher(name, causes))
            stack.callback(handle.remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(_gradient_watcher(name, causes))
                stack.callback(handle.remove)
        yield


def _output_watcher(name: str, causes: list[str]) -> Any:
    def watch(module: nn.Module, arguments: Any, output: Any) -> None:
        if not causes and not is_finite(output):
            own = [
                key for key, parameter in module.named_parameters(recurse=False) if not is_finite(parameter)
            ]
            weights = f", whose {own[0]} is not finite" if own else ""
            causes.append(f"the first output that is not finite is that of {name or 'the model'}{weights}")

    return watch


def _gradient_watcher(name: str, causes: list[str]) -> Any:
    def watch(parameter: nn.Parameter) -> None:
        if not causes and not is_finite(parameter.grad):
            causes.append(f"all outputs are finite, and the first gradient that is not is that of {name}")

    return watch


def is_finite(value: Any) -> bool:
    """Whether all numbers in the tensors of a nested structure are numbers; of sharded ones, in this process's part."""
    return all(bool(_held_here(leaf).isfinite().all()) for leaf in _tensors(value))


def _held_here(tensor: Tensor) -> Tensor:
    """To look at the whole of a sharded tensor, every process would have to; only some come here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves = tree_leaves(dict(value) if hasattr(value, "keys") else value)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
