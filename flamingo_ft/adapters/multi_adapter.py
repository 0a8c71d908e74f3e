"""Several adapters on one base: load, switch, disable, combine.

PEFT switches, disables and combines LoRA, and keeps the LoRA weights of every adapter in memory. The base has
one bridge, which PEFT does not switch: switching loads the tensors of an adapter's folder into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor

from flamingo_ft.backbones.visual_tokens import TokenOptions
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.model.parts import is_lora

from .files import (
    backbone_records,
    parts_in_adapter,
    read_base_name,
    read_config,
    read_lora_config,
    read_processor,
    read_tensors,
)
from .load import check_backbone, check_tensors, load_base, load_lora_weights, set_bridge_parameters
from .lora import unfuse_targeted_attention
from .save import adapter_tensors, save_adapter
from .tile_checks import tiling_of

# What two models must have in common for one bridge to fit both.
GEOMETRY = ("cross_attn_every_n_layers", "media_visibility", "perceiver", "cross_attention", "new_token_ids")

# LoRA settings that must be equal for adapters to be combined.
COMBINABLE = ("r", "rank_pattern", "target_modules", "use_dora")
# LoRA settings that must be equal for one adapter to replace another.
REPLACEABLE = (*COMBINABLE, "lora_alpha", "alpha_pattern", "use_rslora")

Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]


def peft_name(name: str) -> str:
    """Return PEFT's name for the adapter ``name``: valid as a module's name, and one that no module has.

    PEFT finds an adapter by its name among the components of a tensor's name: an adapter named like a module
    (mlp, model, q_proj) would claim that module's tensors.
    """
    return f"adapter:{quote(name, safe='').replace('.', '%2E')}"


class Adapters:
    """Adapters on the base of the first one, by name; one is in use at a time.

    ``model`` is the Flamingo, to be called as any other; ``processor`` its processor.
    """

    def __init__(self, folder: str | Path, name: str = "first", *, start: str | Path | None = None):
        """Load an adapter with its base. Raises UserError as `load_adapter` does."""
        folder = fetch_model(folder)
        self.model: FlamingoForConditionalGeneration = (
            load_base(folder, start=start).eval().requires_grad_(False)
        )
        self.processor = read_processor(folder)
        self._base = read_config(folder)
        self._folders: dict[str, Path] = {}
        self._peft: PeftModel | None = None
        self.in_use: str = ""
        self.load(folder, name)

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, and of those that were combined from them."""
        return list(self._folders)

    def load(self, folder: str | Path, name: str) -> None:
        """Load another adapter of the same base and use it.

        Raises UserError for a taken name or another base.
        """
        self._check_new(name)
        folder = fetch_model(folder)
        self._check_same_base(folder)
        lora = read_lora_config(folder)
        if lora is not None:
            self._inject(name, lora)
            self._load_lora(name, folder)
        self._folders[name] = folder
        self.use(name)

    def replace(self, name: str, folder: str | Path) -> None:
        """Replace a loaded adapter by the one in ``folder``, without allocating new LoRA layers, and use it.

        Raises UserError for another base, or LoRA with other targets, ranks or scales.
        """
        folder = fetch_model(folder)
        self._check_known(name)
        self._check_same_base(folder)
        lora = read_lora_config(folder)
        loaded = self._lora_config(name) if self._has_lora(name) else None
        differing = [key for key in REPLACEABLE if getattr(lora, key, None) != getattr(loaded, key, None)]
        if differing:
            raise UserError(
                f"{folder}: differs from adapter {name} in {differing[0]} of LoRA; load it under another name"
            )
        self._load_lora(name, folder)
        self._folders[name] = folder
        self.use(name)

    def use(self, name: str, *, bridge: bool = True) -> None:
        """Switch to an adapter's LoRA, and unless ``bridge`` is False to its bridge."""
        self._check_known(name)
        if self._peft is not None and self._has_lora(name):
            self._tuner.enable_adapter_layers()
            self._peft.set_adapter(peft_name(name), inference_mode=True)
        elif self._peft is not None:
            self._tuner.disable_adapter_layers()
        if bridge:
            set_bridge_parameters(self.model, self._bridge(name))
        self.in_use, self.model.adapter_base = name, read_base_name(self._folders[name])

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Disable LoRA inside the block. The bridge stays: it is part of the model, not of PEFT."""
        if self._peft is None or not self._has_lora(self.in_use):
            yield
            return
        with self._peft.disable_adapter():
            yield

    def combine(
        self, weights: Mapping[str, float], name: str, method: Combination = "linear", density: float = 0.5
    ) -> None:
        """Combine the LoRA of adapters into a new adapter and use it, with the bridge of the first one.

        Args:
            method: linear; ties (arXiv:2306.01708); dare_linear, dare_ties (arXiv:2311.03099), which drop
                values at random.
            density: fraction of the LoRA weights, 0..1, that all methods but linear keep.

        Raises:
            UserError: an adapter has no LoRA, or ranks differ.
        """
        self._check_new(name)
        first = self._same_lora(list(weights))
        pruned: dict[str, Any] = {} if method == "linear" else {"density": density}
        lora = self._tuner
        names, combined = [peft_name(one) for one in weights], peft_name(name)
        lora.add_weighted_adapter(names, list(weights.values()), combined, combination_type=method, **pruned)
        # The combined weights include the scaling of each adapter. PEFT drops ranks that differ by part.
        own = {"lora_alpha": first.r, "alpha_pattern": dict(first.rank_pattern or {}), "use_rslora": False}
        lora.peft_config[combined] = dataclasses.replace(first, **own)
        for layer in lora.model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling[combined] = 1.0
        self._folders[name] = self._folders[next(iter(weights))]
        self.use(name)

    def save(self, folder: str | Path) -> None:
        """Save the adapter in use, as `save_adapter` does."""
        save_adapter(self.model, self.processor, folder, peft_name(self.in_use))

    def _same_lora(self, names: list[str]) -> LoraConfig:
        """Return the LoRA configuration that adapters have in common.

        Raises UserError if they cannot be combined.
        """
        if not names:
            raise UserError("no adapters to combine; give the weight of each by its name")
        for name in names:
            self._check_known(name)
            if not self._has_lora(name):
                raise UserError(f"adapter {name} has no LoRA to combine; combine adapters with LoRA")
        first, *others = (self._lora_config(name) for name in names)
        differing = [
            key for key in COMBINABLE for other in others if getattr(first, key) != getattr(other, key)
        ]
        if differing:
            raise UserError(
                f"adapters {', '.join(names)} differ in {differing[0]}; combine adapters of the same shape"
            )
        if first.use_dora:
            raise UserError(
                f"adapter {names[0]} has DoRA, whose magnitudes do not add up; combine adapters without it"
            )
        return first

    def _check_new(self, name: str) -> None:
        if name in self._folders:
            raise UserError(f"an adapter named {name} is loaded already; give another name")
        if not name:
            raise UserError("an adapter's name is empty; give it one")

    def _inject(self, name: str, lora: LoraConfig) -> None:
        unfuse_targeted_attention(self.model, lora)
        if self._peft is None:
            self._peft = PeftModel(
                self.model, lora, adapter_name=peft_name(name), autocast_adapter_dtype=False
            )
        else:
            self._peft.add_adapter(peft_name(name), lora, autocast_adapter_dtype=False)

    def _load_lora(self, name: str, folder: Path) -> None:
        tensors = {key: tensor for key, tensor in read_tensors(folder).items() if is_lora(key)}
        expected = adapter_tensors(self.model, peft_name(name))
        check_tensors(folder, tensors, {key: expected[key] for key in expected if is_lora(key)})
        if tensors:
            load_lora_weights(self.model, tensors, peft_name(name))

    @property
    def _tuner(self) -> LoraModel:
        assert self._peft is not None
        return cast(LoraModel, self._peft.base_model)

    def _lora_config(self, name: str) -> LoraConfig:
        return cast(LoraConfig, self._tuner.peft_config[peft_name(name)])

    def _has_lora(self, name: str) -> bool:
        return self._peft is not None and peft_name(name) in self._peft.peft_config

    def _bridge(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's bridge tensors by their names in the model with its LoRA layers."""
        tensors = {n: t for n, t in read_tensors(self._folders[name]).items() if not is_lora(n)}
        parameters = {n.replace(".base_layer.", "."): n for n, _ in self.model.named_parameters()}
        return {parameters[n.replace(".base_layer.", ".")]: tensor for n, tensor in tensors.items()}

    def _check_known(self, name: str) -> None:
        if name not in self._folders:
            raise UserError(f"no adapter named {name}; loaded are {', '.join(self._folders)}")

    def _check_same_base(self, folder: Path) -> None:
        check_same_base(folder, self._base, read_config(folder))
        if tiling_of(folder) != self.processor.image_processor.tiling:
            raise UserError(f"{folder}: the adapter divides images into other tiles; load it separately")


def check_same_base(folder: Path, base: FlamingoConfig, config: FlamingoConfig) -> None:
    """Raise UserError for an adapter of another base: other backbones, or another bridge or parts of it."""
    for part in ("vision", "language"):
        check_backbone(folder, part, backbone_records(config)[part], backbone_records(base)[part])
    for key in GEOMETRY:
        if getattr(config, key) != getattr(base, key):
            raise UserError(
                f"{folder}: base mismatch: {key} is {getattr(config, key)}, here {getattr(base, key)}"
            )
    if config.vision_preprocess != base.vision_preprocess:
        raise UserError(f"{folder}: the adapter uses another image size or preprocessing; load it separately")
    if TokenOptions.of(config.vision_config) != TokenOptions.of(base.vision_config):
        raise UserError(f"{folder}: the adapter reads other visual tokens of the tower; load it separately")
    starts = [(one.bridge_init or {}).get("sha256") for one in (config, base)]
    if starts[0] != starts[1] or parts_in_adapter(config) != parts_in_adapter(base):
        raise UserError(f"{folder}: base mismatch: the adapter builds on another bridge; load it separately")
