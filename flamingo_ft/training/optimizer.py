"""The optimizer of a recipe: parameter groups, learning-rate schedule, and steps inside the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.config.tables import CROSS_ATTENTION
from flamingo_ft.data.opened_data import exact_fraction
from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import (
    GATES,
    LORA,
    LORA_B,
    OPTIMIZER_GROUPS,
    is_decayed,
    is_orthogonalized,
    optimizer_group,
)

from .compat import disable_amp_scaling_in_step, set_last_learning_rates
from .muon import Muon

# The recipe's names -> transformers' names. The fused AdamW needs no temporary memory.
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "muon": "adamw_torch_fused",  # for the parameters that Muon does not update
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


# Peak learning rates that the recipe leaves out. At the rate for trained weights, a new bridge hardly learns
# to use images in its first thousands of samples (tests/benchmarks/new_bridge.py compares them).
NEW_BRIDGE_RATE = 1e-3
TRAINED_RATE = 1e-4  # a bridge from model.init_from, and LoRA
SHARED_GROUPS = {GATES: CROSS_ATTENTION.name, LORA_B: LORA}  # groups that differ by their learning rate alone
NEW_GATES_FACTOR = 10  # a gate is one number, which AdamW moves by about its learning rate per step


def make_optimizer(model: nn.Module, recipe: Recipe, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Return an optimizer over the trainable parameters.

    Raises UserError if ``train.optimizer_in_backward`` is set but cannot work with this number of processes
    or precision.
    """
    groups, train_config = parameter_groups(model, recipe), recipe.train
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    make = partial(optimizer_class, **options)
    if train_config.optimizer == "muon":
        make = partial(Muon, dtype=torch.bfloat16 if arguments.bf16 else torch.float32, **options)
    if not train_config.optimizer_in_backward:
        optimizer = make(groups)
        disable_amp_scaling_in_step(optimizer)
        return optimizer
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise UserError(
            "train.optimizer_in_backward: got "
            f"{max(arguments.world_size, arguments.n_gpu)} processes or GPUs, "
            "whose gradients would have to be reduced before each step; use one (CUDA_VISIBLE_DEVICES=0), "
            "or set it to false"
        )
    if arguments.fp16:
        raise UserError(
            "train.optimizer_in_backward: float16 needs loss scaling, and a step inside the backward pass "
            "cannot be undone when a scaled gradient overflows; use bf16 or fp32, or set it to false"
        )
    return InBackwardOptimizer(groups, make, train_config.max_grad_norm)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Return the parameter groups of each part: those that Muon updates, others with weight decay, the rest.

    ``name``: its entry in `OPTIMIZER_GROUPS`. ``orthogonalized``: whether Muon updates it.
    Weight decay applies to matrices, and not to gates, norms, biases, latents and token rows. Attention gates
    that learn at the rate of their blocks are in the blocks' group, as they were before they could have
    another one, so that the optimizer state of older checkpoints fits; so are LoRA's B matrices in its own
    group. The order depends on the parameter
    names and on that alone, so a saved state fits later runs of the recipe.

    Raises ValueError for a trainable parameter whose group is not in `OPTIMIZER_GROUPS`.
    """
    named, rates = trainable_parameters(model), peak_rates(recipe)
    members: dict[str, list[str]] = {group_name: [] for group_name in OPTIMIZER_GROUPS}
    for name in sorted(named):
        group_name = optimizer_group(name)
        shared = SHARED_GROUPS.get(group_name)
        if shared is not None and rates[group_name] == rates[shared]:
            group_name = shared
        if group_name not in members:
            raise ValueError(f"{name} is trainable, but {group_name} is not in OPTIMIZER_GROUPS")
        members[group_name].append(name)
    uses_muon = recipe.train.optimizer == "muon"
    groups = []
    for group_name, names in members.items():
        orthogonalized = [name for name in names if uses_muon and is_orthogonalized(name)]
        rest = [name for name in names if name not in orthogonalized]
        decayed = [name for name in rest if is_decayed(name, named[name])]
        undecayed = [name for name in rest if not is_decayed(name, named[name])]
        rate, decay = rates[group_name], _weight_decay(recipe.train, group_name)
        for alike, options in (
            (orthogonalized, {"lr": rate, "weight_decay": decay, "orthogonalized": True}),
            (decayed, {"lr": rate, "weight_decay": decay, "orthogonalized": False}),
            (undecayed, {"lr": rate, "weight_decay": 0.0, "orthogonalized": False}),
        ):
            if alike:
                groups.append({"params": [named[name] for name in alike], "name": group_name, **options})
    return groups


def peak_rates(recipe: Recipe) -> dict[str, float]:
    """Return the peak learning rate of each entry of `OPTIMIZER_GROUPS`."""
    own, shared = recipe.train.learning_rates, recipe.train.learning_rate
    is_new = recipe.model.init_from is None
    defaults = dict.fromkeys(OPTIMIZER_GROUPS, NEW_BRIDGE_RATE if is_new else TRAINED_RATE)
    defaults[LORA] = TRAINED_RATE
    rates = {name: getattr(own, name, None) or shared or defaults[name] for name in OPTIMIZER_GROUPS}
    gates = rates[CROSS_ATTENTION.name] * (NEW_GATES_FACTOR if is_new else 1)
    return rates | {GATES: own.gates or gates, LORA_B: rates[LORA] * (own.loraplus_lr_ratio or 1)}


def _weight_decay(train_config: TrainSection, group_name: str) -> float:
    """Return the weight decay of a group's matrices; ``train.weight_decays`` has no entry for token rows."""
    own = getattr(train_config.weight_decays, LORA if group_name == LORA_B else group_name, None)
    return train_config.weight_decay if own is None else own


# --- learning-rate schedule ---


def warmup_steps(train_config: TrainSection) -> int:
    """Return the number of warmup steps of a recipe whose ``max_steps`` is known."""
    if train_config.warmup_ratio is None:
        return train_config.warmup_steps
    assert train_config.max_steps is not None
    return math.ceil(exact_fraction(train_config.warmup_ratio) * train_config.max_steps)


def recompute_learning_rates(scheduler: Any) -> None:
    """Recompute the learning rates of the current step from the schedule of this run, after a resume.

    scheduler: a restored `LambdaLR`. The restored optimizer state contains the rates of the schedule that it
    was saved with, which may have had fewer steps.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # unwrap accelerate's scheduler
    lambdas = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base_lr * factor(schedule.last_epoch) for base_lr, factor in lambdas]
    set_last_learning_rates(schedule, rates)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# --- steps inside the backward pass ---


class InBackwardOptimizer(torch.optim.Optimizer):
    """Updates each parameter in the backward pass, once its gradient is complete, and frees the gradient.

    The gradients of all parameters are thus never in memory together; LOMO (arXiv:2306.09782) does this for
    SGD. The norm of the whole gradient is not known yet, so each parameter's gradient is clipped to
    ``max_norm`` separately.

    make: builds an optimizer from parameter groups; it is called once per parameter. Learning rates are read
    from this optimizer's own groups, so any scheduler works.
    """

    def __init__(
        self, groups: list[dict], make: Callable[[list[dict]], torch.optim.Optimizer], max_norm: float
    ):
        super().__init__(groups, defaults=make(groups).defaults)
        self.max_norm = max_norm
        self._norms: list[torch.Tensor] = []
        self._optimizers = {p: make([{**g, "params": [p]}]) for g in self.param_groups for p in g["params"]}
        self._share_state()
        for parameter in self._optimizers:
            parameter.register_post_accumulate_grad_hook(self._step_parameter)

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        """Do nothing: the steps were taken in the backward pass."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: each gradient is freed after its step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces groups and state; accelerate calls it before training
        self._restore_state_dtypes(state_dict)
        self._share_state()

    def pop_grad_norm(self) -> torch.Tensor:
        """Return the norm, before clipping, of all gradients used since the last call."""
        norms, self._norms = self._norms, []
        return nn.utils.get_total_norm(norms)

    def _restore_state_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Copy the saved state uncast: torch casts it to the parameter's dtype, which breaks 8-bit state."""
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, self._optimizers, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _share_state(self) -> None:
        """Make the per-parameter optimizers use this one's state, so that it is saved and loaded as usual."""
        self._groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for optimizer in self._optimizers.values():
            optimizer.state = self.state

    def _step_parameter(self, parameter: nn.Parameter) -> None:
        optimizer = self._optimizers[parameter]
        optimizer.param_groups[0]["lr"] = self._groups[parameter]["lr"]
        self._norms.append(nn.utils.clip_grad_norm_([parameter], self.max_norm))
        optimizer.step()
        parameter.grad = None


def find_in_backward_optimizer(optimizer: Any) -> InBackwardOptimizer | None:
    """Return a trainer's optimizer, without accelerate's wrapper, if it steps inside the backward pass."""
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    return unwrapped if isinstance(unwrapped, InBackwardOptimizer) else None
