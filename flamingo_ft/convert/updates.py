"""LoRA of a foreign checkpoint, put into the model as this package's adapters have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flamingo_ft.adapters.load import load_lora_weights
from flamingo_ft.adapters.lora import inject, linear_layers, lora_config
from flamingo_ft.adapters.trainable import PREFIXES
from flamingo_ft.config import LoraPart, LoraSection
from flamingo_ft.errors import UserError
from flamingo_ft.formats.stored import some
from flamingo_ft.model import FlamingoForConditionalGeneration

_A, _B = ".lora_A.weight", ".lora_B.weight"


def add_updates(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], alpha: float | None, where: Path
) -> None:
    """Put updates beside the matrices that they are of. UserError for one without a matrix, and where alpha is not known."""
    if alpha is not None and (alpha < 1 or alpha != int(alpha)):
        raise UserError(f"{where}: lora_alpha {alpha} is no whole number from 1 on; only those can be kept")
    if alpha is None:
        raise UserError(
            f"{where}: its LoRA comes without lora_alpha; say what it was trained with (--lora-alpha)"
        )
    targets = {part: names for part in PREFIXES if (names := _targets(tensors, PREFIXES[part]))}
    known = {part: set(linear_layers(model, part)) for part in targets}
    foreign = [name for part, names in targets.items() for name in names if name not in known[part]]
    if foreign:
        raise UserError(
            f"{where}: has updates of {some(foreign)}, which the language model lacks; name its own (--language)"
        )
    _check_complete(model, tensors, [name for names in targets.values() for name in names], where)
    parts = {
        part: LoraPart(r=_rank(tensors, names, where), lora_alpha=int(alpha))
        for part, names in targets.items()
    }
    inject(model, lora_config(model, LoraSection(**parts), targets))
    load_lora_weights(model, tensors)


def _check_complete(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], targets: list[str], where: Path
) -> None:
    """Refuse updates of another kind than LoRA's two matrices, and those that do not fit the matrix that they are of."""
    wanted = {name + ending for name in targets for ending in (_A, _B)}
    if other := sorted(wanted ^ tensors.keys()):
        raise UserError(
            f"{where}: its LoRA has or lacks {some(other)}; only pairs of lora_A and lora_B can be kept"
        )
    for name in targets:
        rows, columns = model.get_submodule(name).weight.shape
        if (tensors[name + _A].shape[1], len(tensors[name + _B])) not in ((columns, rows), (rows, columns)):
            found = tuple(tensors[name + _B].shape), tuple(tensors[name + _A].shape)
            raise UserError(
                f"{where}: updates {name} {(rows, columns)} by {found}; name the language model of the checkpoint"
            )


def _targets(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name.removesuffix(_A) for name in tensors if name.startswith(prefix) and name.endswith(_A)]


def _rank(tensors: Mapping[str, Tensor], names: list[str], where: Path) -> int:
    ranks = {len(tensors[name + _A]) for name in names}
    if len(ranks) > 1:
        raise UserError(
            f"{where}: updates of one part have ranks {sorted(ranks)}; only one rank for each part can be kept"
        )
    return ranks.pop()
