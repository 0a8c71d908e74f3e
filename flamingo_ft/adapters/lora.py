"""LoRA (arXiv:2106.09685) on the parts of a Flamingo, through PEFT.

All parts share one ``peft.LoraConfig``, because PEFT allows one per adapter: the targets are one regex over
module names, rank and alpha can differ by part, and all other options are shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.visual_tokens import modules_after_tokens
from flamingo_ft.config import LoraPart, LoraSection
from flamingo_ft.config.tables import VISION
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import PARTS

from .lora_init import Batches, check_lora_init, eva_directions, init_eva, init_loftq, lora_weights

ADAPTER = "default"  # PEFT's name for the only adapter of a model
ALL_LINEAR = "all-linear"


def add_lora(
    model: FlamingoForConditionalGeneration, lora: LoraSection, batches: Batches | None = None
) -> LoraConfig | None:
    """Add LoRA to the layers that ``lora`` names, in place; return None if it names no part.

    Args:
        batches: returns some training batches, for an initialization that needs them.

    Raises:
        UserError: a target matches nothing, or the weights do not allow the initialization.
    """
    if not lora.parts:
        return None
    if "vision" in lora.parts:
        unfuse_attention(model.vision_encoder)
    targets = {part: find_targets(model, part, settings) for part, settings in lora.parts.items()}
    config = lora_config(model, lora, targets)
    check_lora_init(model, lora, [name for names in targets.values() for name in names])
    directions = eva_directions(model, config, batches) if lora.init_lora_weights == "eva" else {}
    inject(model, config)
    if lora.init_lora_weights == "pissa":
        model.initial_lora = lora_weights(model)
    elif lora.init_lora_weights == "loftq":
        init_loftq(model)
    init_eva(model, directions)
    return config


def inject(model: FlamingoForConditionalGeneration, config: LoraConfig) -> None:
    """Add the LoRA layers that ``config`` describes; what else is trainable stays as it was."""
    unfuse_targeted_attention(model, config)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():  # PEFT freezes everything but LoRA
        parameter.requires_grad_(trains.get(name.replace(".base_layer.", "."), parameter.requires_grad))


def unfuse_targeted_attention(model: FlamingoForConditionalGeneration, config: LoraConfig) -> None:
    """Unfuse the tower's attention if ``config`` has targets there: fused, it has no linear layers."""
    if targets_vision(config):
        unfuse_attention(model.vision_encoder)


def targets_vision(config: LoraConfig) -> bool:
    """Return whether a configuration of this package has targets in the vision tower."""
    return re.escape(VISION.prefix) in str(config.target_modules)


def find_targets(model: FlamingoForConditionalGeneration, part: str, lora: LoraPart) -> list[str]:
    """Return the names of the layers of ``part`` that get LoRA. Raises UserError if no layer matches."""
    known = linear_layers(model, part)
    suffixes = lora.target_modules
    targets = [name for name in known if ALL_LINEAR in suffixes or _has_suffix(name, suffixes)]
    unmatched = [
        suffix
        for suffix in suffixes
        if suffix != ALL_LINEAR and not any(_has_suffix(name, [suffix]) for name in known)
    ]
    if unmatched or not targets:
        names = (_without_numbers(name.removeprefix(PARTS[part].prefix)) for name in known)
        available = ", ".join(dict.fromkeys(names)) or "none"
        raise UserError(
            f"lora.{part}.target_modules: {(unmatched or [ALL_LINEAR])[0]} matches no matrix of the {part} "
            f"part; it has {available} (the output head's new rows train by themselves)"
        )
    return targets


def linear_layers(model: FlamingoForConditionalGeneration, part: str) -> list[str]:
    """Return the names of a part's linear layers that can get LoRA.

    The language model's output head cannot, nor layers of the tower that its patch tokens do not depend on.
    """
    prefix = PARTS[part].prefix
    excluded = {model.lang_encoder.get_output_embeddings()}
    if part == "vision":
        excluded |= modules_after_tokens(model.vision_encoder)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, (nn.Linear, Conv1D)) and module not in excluded
    ]


def lora_config(
    model: FlamingoForConditionalGeneration, lora: LoraSection, targets: Mapping[str, Sequence[str]]
) -> LoraConfig:
    """Return PEFT's configuration of LoRA on ``targets``, layer names by part."""
    first, *others = lora.parts
    patterns = (_pattern(names, linear_layers(model, part)) for part, names in targets.items())
    return LoraConfig(
        base_model_name_or_path=base_name(model),
        r=lora.parts[first].r,
        lora_alpha=lora.parts[first].lora_alpha,
        rank_pattern={_anywhere_in(part): lora.parts[part].r for part in others},
        alpha_pattern={_anywhere_in(part): lora.parts[part].lora_alpha for part in others},
        target_modules="|".join(patterns),
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.rank_stabilized,
        init_lora_weights=peft_init(lora),  # pyrefly: ignore[bad-argument-type]
    )


def base_name(model: FlamingoForConditionalGeneration) -> str | None:
    """Return what PEFT records as the base: what the loaded adapter named, else the language model."""
    language = (model.config.backbones or {}).get("language") or {}
    return getattr(model, "adapter_base", None) or language.get("name")


def peft_init(lora: LoraSection) -> bool | str:
    """Return the initialization that PEFT does itself; LoftQ and EVA are done afterwards."""
    return lora.init_lora_weights if lora.init_lora_weights in ("gaussian", "pissa") else True


def has_lora(model: nn.Module, adapter: str = ADAPTER) -> bool:
    """Return whether the LoRA layers of ``adapter`` were injected into the model."""
    peft_config: Any = getattr(model, "peft_config", {})
    return adapter in peft_config


def _has_suffix(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def _anywhere_in(part: str) -> str:
    return re.escape(PARTS[part].prefix) + ".*"


def _pattern(names: Sequence[str], known: Sequence[str]) -> str:
    """Return a pattern that matches exactly ``names`` among ``known``, with any layer number if possible."""
    exact = sorted({re.escape(name) for name in names}, key=len)
    general = sorted({re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", name) for name in exact})
    matched = {name for name in known if any(re.fullmatch(pattern, name) for pattern in general)}
    return "|".join(general if matched == set(names) else sorted(exact))
