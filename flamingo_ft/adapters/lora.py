"""LoRA (arXiv:2106.09685) on the parts of a Flamingo, through PEFT.

All parts share one ``peft.LoraConfig``, as an adapter has one: its targets are one pattern over the names of matrices,
rank and alpha vary by part, the rest holds for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from flamingo_ft.backbones.attention import unfuse_attention
from flamingo_ft.backbones.tower import modules_after_tokens
from flamingo_ft.config import LoraPart, LoraSection
from flamingo_ft.config.tables import VISION
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import PARTS

from .lora_init import (
    Batches,
    check_lora_init,
    eva_directions,
    init_eva,
    init_loftq,
    lora_weights,
)

ADAPTER = "default"  # PEFT's name for the only adapter of a model


def add_lora(
    model: FlamingoForConditionalGeneration, lora: LoraSection, batches: Batches | None = None
) -> LoraConfig | None:
    """Put updates beside the matrices that ``lora`` names, in place; None where it names no part.

    batches: gives some training batches, for the initialisation that looks at them. Raises UserError for a target that
    matches nothing, and for an initialisation that the weights do not allow.
    """
    if not lora.parts:
        return None
    if lora.vision:  # its attention has matrices that no layer is called for
        unfuse_attention(model.vision_encoder)
    targets = {part: find_targets(model, part, wanted) for part, wanted in lora.parts.items()}
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
    """Put the updates that ``config`` describes into the model. The rest of the model is left as it was."""
    unfuse_targeted_attention(model, config)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():  # PEFT freezes all that is not LoRA
        parameter.requires_grad_(trains.get(name.replace(".base_layer.", "."), parameter.requires_grad))


def unfuse_targeted_attention(model: FlamingoForConditionalGeneration, config: LoraConfig) -> None:
    """Give the tower linear layers for all its matrices where ``config`` updates some of them."""
    if targets_vision(config):
        unfuse_attention(model.vision_encoder)


def targets_vision(config: LoraConfig) -> bool:
    """Whether a configuration of this package has updates to matrices of the vision tower."""
    return re.escape(VISION.prefix) in config.target_modules


def find_targets(model: FlamingoForConditionalGeneration, part: str, wanted: LoraPart) -> list[str]:
    """Names in the model of the matrices of ``part`` that get an update. UserError where there are none."""
    known = linear_layers(model, part)
    asked = wanted.target_modules
    found = [name for name in known if "all-linear" in asked or _ends_in(name, asked)]
    unmatched = [
        target for target in asked if target != "all-linear" and not any(_ends_in(n, [target]) for n in known)
    ]
    if unmatched or not found:
        exist = ", ".join(
            dict.fromkeys(_without_numbers(name.removeprefix(PARTS[part].prefix)) for name in known)
        )
        raise UserError(
            f"lora.{part}.target_modules: {(unmatched or ['all-linear'])[0]} matches no matrix of the {part} part; "
            f"it has {exist or 'none'} (the output head's new rows train by themselves)"
        )
    return found


def linear_layers(model: FlamingoForConditionalGeneration, part: str) -> list[str]:
    """Names of the matrices of a part that can get an update; not the language model's output head, nor layers
    of the tower that its spatial tokens do not come from."""
    prefix, left_out = PARTS[part].prefix, {model.lang_encoder.get_output_embeddings()}
    if part == "vision":
        left_out |= modules_after_tokens(model.vision_encoder)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, (nn.Linear, Conv1D)) and module not in left_out
    ]


def lora_config(
    model: FlamingoForConditionalGeneration, lora: LoraSection, targets: dict[str, Sequence[str]]
) -> LoraConfig:
    """PEFT's configuration of updates to ``targets``, names by part."""
    first, *others = lora.parts
    return LoraConfig(
        base_model_name_or_path=base_name(model),
        r=lora.parts[first].r,
        lora_alpha=lora.parts[first].lora_alpha,
        rank_pattern={_anywhere_in(part): lora.parts[part].r for part in others},
        alpha_pattern={_anywhere_in(part): lora.parts[part].lora_alpha for part in others},
        target_modules="|".join(
            _pattern(names, linear_layers(model, part)) for part, names in targets.items()
        ),
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=peft_init(lora),
    )


def base_name(model: FlamingoForConditionalGeneration) -> str | None:
    """What PEFT records as the base model: what the adapter that was loaded named, else the language model."""
    return getattr(model, "adapter_base", None) or ((model.config.backbones or {}).get("language") or {}).get(
        "name"
    )


def peft_init(lora: LoraSection) -> bool | str:
    """What PEFT itself starts the updates from; the others are started from afterwards."""
    return lora.init_lora_weights if lora.init_lora_weights in ("gaussian", "pissa") else True


def has_lora(model: nn.Module, adapter: str = ADAPTER) -> bool:
    """Whether the updates of ``adapter`` were put into the model."""
    return adapter in getattr(model, "peft_config", {})


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def _anywhere_in(part: str) -> str:
    return re.escape(PARTS[part].prefix) + ".*"


def _pattern(names: Sequence[str], known: Sequence[str]) -> str:
    """A pattern that matches exactly ``names`` among ``known``: any layer's number where that is enough."""
    by_kind = sorted({re.escape(name) for name in names}, key=len)
    general = sorted({re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", name) for name in by_kind})
    matched = {name for name in known if any(re.fullmatch(pattern, name) for pattern in general)}
    return "|".join(general if matched == set(names) else sorted(by_kind))
