"""Private names of torch and transformers that the model needs, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What `Module.load_state_dict` returns; `Flamingo` returns the same for OpenFlamingo's keys.
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.utils._pytree import tree_map_only  # torch has no public way to map over nested arguments
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

# Declares a sub-configuration with a default model type, as transformers' composite configurations do.
from transformers.configuration_utils import SubConfigSpec

# The base class of blocks that `gradient_checkpointing_enable` reaches.
from transformers.modeling_layers import GradientCheckpointingLayer

# What the pipeline is asked to return; part of the signature that is overridden.
from transformers.pipelines.image_text_to_text import ReturnType

# Whether transformers' quantizer leaves out a module; the rest of the tower has to be left out by the same
# rule.
from transformers.quantizers.quantizers_utils import should_convert_module

# How a tokenizer truncates a text.
from transformers.tokenization_utils_base import TruncationStrategy

# Renders a chat template together with the spans of its generation marks, which `apply_chat_template` does
# not return.
from transformers.utils.chat_template_utils import render_jinja_template

# Renames an argument and warns, as transformers' own models do.
from transformers.utils.deprecation import deprecate_kwarg

__all__ = [
    "GradientCheckpointingLayer",
    "IncompatibleKeys",
    "ReturnType",
    "SubConfigSpec",
    "WrapperTensor",
    "checkpoint_block",
    "deprecate_kwarg",
    "forget_weight_conversions",
    "in_backward",
    "keep_weights",
    "render_jinja_template",
    "should_convert_module",
    "tree_map_only",
    "truncation_length",
]


def in_backward() -> bool:
    """Return whether this thread is inside a backward pass; torch has no public way to ask."""
    return torch._C._current_graph_task_id() != -1


def checkpoint_block(block: Any, options: dict[str, Any]) -> None:
    """Make one block recompute its activations.

    `gradient_checkpointing_enable` exists only on transformers models.
    """
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = partial(checkpoint, **options)


def keep_weights(module: nn.Module) -> None:
    """Mark a module as initialized, so that transformers does not initialize its weights anew."""
    for part in module.modules():
        part._is_hf_initialized = True  # pyrefly: ignore[bad-argument-type]


def forget_weight_conversions(model: Any) -> None:
    """Allow a loaded quantized model to be saved: transformers 5.23 cannot convert its weights back."""
    model._weight_conversions = None


def truncation_length(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a tokenizer called with these options returns for a text; None if any.

    The defaults are its own, which it has no public method for.
    """
    names = ("padding", "truncation", "max_length", "pad_to_multiple_of")
    chosen = {name: options[name] for name in names if name in options}
    _, strategy, length, _ = tokenizer._get_padding_truncation_strategies(**chosen, verbose=False)
    return None if strategy == TruncationStrategy.DO_NOT_TRUNCATE else length


class WrapperTensor(Tensor):
    """A tensor without storage, whose operations all go to ``__torch_dispatch__`` (a wrapper subclass)."""

    # Counts as a parameter, so that offloading of activations leaves it alone.
    _is_param = True
    __torch_function__: Callable = torch._C._disabled_torch_function_impl

    @classmethod
    def make(cls, size: tuple[int, ...], like: Tensor) -> Any:
        """Return an instance of ``size`` with the dtype and device of ``like``."""
        return Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
