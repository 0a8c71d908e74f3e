"""An optimizer whose steps happen inside the backward pass, so that gradients are never held together.

The gradient of a parameter is clipped, used and freed as soon as it is complete (LOMO, arXiv:2306.09782, does so for SGD).
No norm over all gradients is known by then: each is clipped to its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class InBackward(torch.optim.Optimizer):
    """Steps each parameter of ``groups`` with an optimizer of its own, made by ``make(groups)``, as backward reaches it.

    max_norm: what the gradient of each parameter is scaled down to where it is longer. Learning rates are read from this
    optimizer's groups, so schedulers work on it as on any other; its own `step` has nothing left to do.
    """

    def __init__(
        self, groups: list[dict], make: Callable[[list[dict]], torch.optim.Optimizer], max_norm: float
    ):
        super().__init__(groups, defaults=make(groups).defaults)
        self.max_norm = max_norm
        self._norms: list[torch.Tensor] = []
        self._optimizers = {p: make([{**g, "params": [p]}]) for g in self.param_groups for p in g["params"]}
        self._share()
        for parameter in self._optimizers:
            parameter.register_post_accumulate_grad_hook(self._step_one)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Nothing: the steps were taken in the backward pass."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient is kept."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(
            state_dict
        )  # makes new groups and a new state; accelerate does this before training
        self._take_as_it_was_kept(state_dict)
        self._share()

    def take_norm(self) -> torch.Tensor:
        """The norm of all gradients that were stepped with since it was asked for last, before they were clipped."""
        norms, self._norms = self._norms, []
        return nn.utils.get_total_norm(norms)

    def _take_as_it_was_kept(self, state_dict: dict[str, Any]) -> None:
        """torch casts all state to the format of its parameter, which makes nonsense of a state in 8 bits."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(saved, self._optimizers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _share(self) -> None:
        """One state for all, so that it is saved and loaded as any optimizer's, and the groups that schedulers change."""
        self._groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for optimizer in self._optimizers.values():
            optimizer.state = self.state

    def _step_one(self, parameter: nn.Parameter) -> None:
        optimizer = self._optimizers[parameter]
        optimizer.param_groups[0]["lr"] = self._groups[parameter]["lr"]
        self._norms.append(nn.utils.clip_grad_norm_([parameter], self.max_norm))
        optimizer.step()
        parameter.grad = None


def inside_backward(optimizer: Any) -> InBackward | None:
    """The optimizer of a trainer, where it is one that steps inside the backward pass."""
    own = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    return own if isinstance(own, InBackward) else None
