"""The optimizer that a recipe asks for, over what trains."""

from __future__ import annotations

from functools import partial

import torch
from transformers import Trainer, TrainingArguments

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.backbones.quantization import require_bitsandbytes
from flamingo_ft.config import TrainSection
from flamingo_ft.errors import UserError

from . import processes
from .in_backward import InBackward

# Vectors and tables that stand for themselves; pulling them to zero would not make the model simpler.
UNDECAYED = ("perceiver.latents", "perceiver.frame_embs", "perceiver.media_time_embs", "token_rows.")

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
    if wanted.optimizer != "adamw":
        require_bitsandbytes(f"train.optimizer: {wanted.optimizer}", instead="adamw")
    if wanted.activation_offload and not torch.cuda.is_available():
        raise UserError("train.activation_offload: found no GPU to move activations away from; set it to false")


def _refuse_gpus_in_one_process(gpus: int) -> None:
    """Trainer would copy the model to each GPU in every step (`nn.DataParallel`), slowly, and with wrong gradients here."""
    if gpus > 1 and processes.world_size() == 1:
        raise UserError(
            f"found {gpus} GPUs and one process; use one GPU with CUDA_VISIBLE_DEVICES=0, or all with "
            f"torchrun --nproc-per-node {gpus} -m flamingo_ft train ..."
        )


def make_optimizer(model: torch.nn.Module, wanted: TrainSection, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """An optimizer over what trains. UserError for a step inside the backward pass where that cannot be."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    make = partial(kind, **options)
    groups = parameter_groups(model, wanted.weight_decay)
    if not wanted.optimizer_in_backward:
        return make(groups)
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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters for the optimizer: matrices decay; gates, norms, latents and token rows do not."""
    named = trainable_parameters(model)
    decayed = {name for name, p in named.items() if p.dim() >= 2 and not name.startswith(UNDECAYED)}
    groups = [
        {"params": [named[name] for name in sorted(decayed)], "weight_decay": weight_decay},
        {"params": [named[name] for name in sorted(named.keys() - decayed)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
