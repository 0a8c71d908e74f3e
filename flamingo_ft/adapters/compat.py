"""Private names of transformers and peft that adapters need, each with its reason."""

from __future__ import annotations

# target_modules of an adapter without LoRA; not re-exported
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

# How transformers saves some weights in another layout than in memory (one tensor per expert): the only way
# to know under which names a merged model is written.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

__all__ = [
    "DUMMY_TARGET_MODULES",
    "get_model_conversion_mapping",
    "keep_generation_config",
    "mark_peft_loaded",
    "requested_attention",
    "revert_weight_conversion",
]


def keep_generation_config(config: GenerationConfig) -> None:
    """Keep ``generate`` from replacing ``config`` by one made from the language model's config."""
    config._from_model_config = False


def mark_peft_loaded(model: PreTrainedModel, has_lora: bool) -> None:
    """Say whether adapters were injected; transformers' own adapter methods ask for it."""
    model._hf_peft_config_loaded = has_lora


def requested_attention(config: PreTrainedConfig) -> str | None:
    """Return the attn_implementation that an Auto class was asked for: it is passed on in the config only."""
    return getattr(config, "_attn_implementation_internal", None)
