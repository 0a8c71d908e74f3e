"""The optimizer that a recipe asks for, over what trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import torch
from transformers import Trainer, TrainingArguments

from flamingo_ft import processes
from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.backbones.quantization import require_bitsandbytes
from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import OPTIMIZER_GROUPS, is_decayed, optimizer_group

from .in_backward import InBackward

# The recipe's names -> transformers'. The fused AdamW needs no memory of its own.
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def check_machine(wanted: TrainSection) -> None:
    """Refuse what this machine cannot do, before anything is loaded."""
    _refuse_gpus_in_one_process(torch.cuda.device_count())
    _refuse_accelerates_sharding(os.environ)
    if wanted.fsdp and processes.world_size() == 1:
        raise UserError(
            "train.fsdp: found one process, nothing to share with; start several (torchrun --nproc-per-node 2 -m "
            "flamingo_ft train ...), or set it to false"
        )
    if wanted.optimizer != "adamw":
        require_bitsandbytes(f"train.optimizer: {wanted.optimizer}", instead="adamw")
    if wanted.activation_offload and not torch.cuda.is_available():
        raise UserError(
            "train.activation_offload: found no GPU to move activations away from; set it to false"
        )


def _refuse_gpus_in_one_process(gpus: int) -> None:
    """Trainer would copy the model to each GPU in every step (`nn.DataParallel`), slowly, and with wrong gradients here."""
    if gpus > 1 and processes.world_size() == 1:
        raise UserError(
            f"found {gpus} GPUs and one process; use one GPU with CUDA_VISIBLE_DEVICES=0, or all with "
            f"torchrun --nproc-per-node {gpus} -m flamingo_ft train ..."
        )


def _refuse_accelerates_sharding(environment: Mapping[str, str]) -> None:
    """Which knows nothing of the units here, nor Trainer then of the optimizer's groups."""
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "accelerate: found a configuration of FSDP, which does not know how a Flamingo is sharded; use one without it "
            "(recipes/accelerate/ddp.yaml), and set train.fsdp to true"
        )


def make_optimizer(
    model: torch.nn.Module, wanted: TrainSection, arguments: TrainingArguments
) -> torch.optim.Optimizer:
    """An optimizer over what trains. UserError for a step inside the backward pass where that cannot be."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    make = partial(kind, **options)
    groups = parameter_groups(model, wanted)
    if not wanted.optimizer_in_backward:
        optimizer = make(groups)
        # A fused step takes the scaler's part and counts as taken where the gradient overflowed; schedules would go on.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise UserError(
            f"train.optimizer_in_backward: found {max(arguments.world_size, arguments.n_gpu)} processes or GPUs; gradients "
            "would have to be shared before each step: use one (CUDA_VISIBLE_DEVICES=0), or set it to false"
        )
    if arguments.fp16:
        raise UserError(
            "train.optimizer_in_backward: float16 scales the loss, and a step inside the backward pass cannot be taken "
            "back where that overflows; use bf16 or fp32, or set it to false"
        )
    return InBackward(groups, make, wanted.max_grad_norm)


def parameter_groups(model: torch.nn.Module, wanted: TrainSection) -> list[dict]:
    """The trainable parameters for the optimizer: by part, and in each what decays before what does not.

    Each group has the ``name`` of its part. Matrices decay; gates, norms, biases, latents and token rows do not. The order
    depends on the names of the parameters alone, so a state that was saved fits any later run of the recipe.
    """
    named = trainable_parameters(model)
    groups = []
    for part in OPTIMIZER_GROUPS:
        of_part = sorted(name for name in named if optimizer_group(name) == part)
        decayed = [name for name in of_part if is_decayed(name, named[name])]
        undecayed = [name for name in of_part if name not in {*decayed}]
        rate = getattr(wanted.learning_rates, part) or wanted.learning_rate
        for names, decay in ((decayed, _decay(wanted, part)), (undecayed, 0.0)):
            groups.append(
                {"params": [named[n] for n in names], "name": part, "lr": rate, "weight_decay": decay}
            )
    return [group for group in groups if group["params"]]


def _decay(wanted: TrainSection, part: str) -> float:
    """Of a part's matrices. Token rows are named nowhere: none of them decays."""
    own = getattr(wanted.weight_decays, part, None)
    return wanted.weight_decay if own is None else own
