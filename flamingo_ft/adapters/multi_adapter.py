"""Several adapters on one base: load, switch, disable, combine.

LoRA is switched, disabled and combined by PEFT, which keeps every adapter's updates in memory. Bridges are not PEFT's to
switch: the base has one bridge, and switching copies the tensors of an adapter's folder into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.model.parts import is_lora

from .files import read_base_name, read_config, read_lora_config, read_processor, read_tensors
from .init_from import GEOMETRY
from .load import check_backbone, check_tensors, load_base, load_lora_weights, set_bridge_parameters
from .lora import unfuse_targeted_attention
from .save import adapter_tensors, save_adapter
from .trainable import parts_in_adapter

# What adapters must have in common for their updates to be combined entry by entry.
COMBINABLE = ("r", "rank_pattern", "target_modules", "use_dora")
# ... and for one to take the other's place.
REPLACEABLE = (*COMBINABLE, "lora_alpha", "alpha_pattern", "use_rslora")

Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]


def peft_name(name: str) -> str:
    """PEFT's name of the adapter ``name``: one that no module has, and that is valid as a module's.

    PEFT identifies adapters by their names among the components of a tensor's name. One that is called as a module is
    (mlp, model, q_proj) would take that module's tensors away from the others.
    """
    return f"adapter:{quote(name, safe='').replace('.', '%2E')}"


class Adapters:
    """Adapters on the base of the first one, by name; one is in use at a time.

    model: the Flamingo, to be called as any other; processor: what feeds it.
    """

    def __init__(self, folder: str | Path, name: str = "first", *, start: str | Path | None = None):
        """Load the base of the adapter in ``folder``, and the adapter. Raises UserError as `load_adapter` does."""
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
        """Of the adapters that are loaded, and of those that were combined from them."""
        return list(self._folders)

    def load(self, folder: str | Path, name: str) -> None:
        """Load another adapter of the same base, and use it. UserError for a name that is taken and for another base."""
        self._check_new(name)
        folder = fetch_model(folder)
        check_same_base(folder, self._base, read_config(folder))
        lora = read_lora_config(folder)
        if lora is not None:
            self._inject(name, lora)
            updates = {n: t for n, t in read_tensors(folder).items() if is_lora(n)}
            expected = {n: t for n, t in adapter_tensors(self.model, peft_name(name)).items() if is_lora(n)}
            check_tensors(folder, updates, expected)
            load_lora_weights(self.model, updates, peft_name(name))
        self._folders[name] = folder
        self.use(name)

    def replace(self, name: str, folder: str | Path) -> None:
        """Put the adapter in ``folder`` in the place of a loaded one, LoRA into the memory of its LoRA, and use it.

        Raises UserError for another base, and for LoRA of other matrices, ranks or scales.
        """
        folder = fetch_model(folder)
        self._check_known(name)
        check_same_base(folder, self._base, read_config(folder))
        lora = read_lora_config(folder)
        there = self._peft.peft_config[peft_name(name)] if self._has_lora(name) else None
        differing = [key for key in REPLACEABLE if getattr(lora, key, None) != getattr(there, key, None)]
        if differing:
            raise UserError(
                f"{folder}: differs from adapter {name} in {differing[0]} of LoRA; load it under another name"
            )
        updates = {n: t for n, t in read_tensors(folder).items() if is_lora(n)}
        expected = {n: t for n, t in adapter_tensors(self.model, peft_name(name)).items() if is_lora(n)}
        check_tensors(folder, updates, expected)
        if updates:
            load_lora_weights(self.model, updates, peft_name(name))
        self._folders[name] = folder
        self.use(name)

    def use(self, name: str, *, bridge: bool = True) -> None:
        """Switch to an adapter: to its LoRA, and unless ``bridge`` is False to its bridge."""
        self._check_known(name)
        if self._has_lora(name):
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(peft_name(name), inference_mode=True)
        elif self._peft is not None:
            self._peft.base_model.disable_adapter_layers()
        if bridge:
            set_bridge_parameters(self.model, self._bridge(name))
        self.in_use, self.model.adapter_base = name, read_base_name(self._folders[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Without LoRA inside the block. The bridge stays: it is part of the model, not of PEFT."""
        if self._peft is None or not self._has_lora(self.in_use):
            yield
            return
        with self._peft.disable_adapter():
            yield

    def combine(
        self, weights: Mapping[str, float], name: str, method: Combination = "linear", density: float = 0.5
    ) -> None:
        """Combine the LoRA of adapters into a new adapter and use it, with the bridge of the first one named.

        method: linear; ties (arXiv:2306.01708); dare_linear, dare_ties (arXiv:2311.03099), which drop updates at random.
        density: share of the updates, 0..1, that the latter three keep. Raises UserError for adapters without LoRA and for
        ranks that differ.
        """
        self._check_new(name)
        first = self._same_lora(list(weights))
        pruned = {} if method == "linear" else {"density": density}
        lora = self._peft.base_model
        names, combined = [peft_name(one) for one in weights], peft_name(name)
        lora.add_weighted_adapter(names, list(weights.values()), combined, combination_type=method, **pruned)
        # The scaling of each is in the combination by now. PEFT forgets that parts have ranks of their own.
        own = {"lora_alpha": first.r, "alpha_pattern": dict(first.rank_pattern), "use_rslora": False}
        lora.peft_config[combined] = dataclasses.replace(first, **own)
        for layer in lora.model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling[combined] = 1.0
        self._folders[name] = self._folders[next(iter(weights))]
        self.use(name)

    def save(self, folder: str | Path) -> None:
        """Write the adapter in use, as `save_adapter` does."""
        save_adapter(self.model, self.processor, folder, peft_name(self.in_use))

    def _same_lora(self, names: list[str]) -> LoraConfig:
        """The configuration that adapters to combine have in common. UserError where they have none."""
        if not names:
            raise UserError("found no adapters to combine; give the weight of each by its name")
        for name in names:
            self._check_known(name)
            if not self._has_lora(name):
                raise UserError(f"adapter {name} has no LoRA to combine; combine adapters with LoRA")
        first, *others = (self._peft.peft_config[peft_name(name)] for name in names)
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

    def _has_lora(self, name: str) -> bool:
        return self._peft is not None and peft_name(name) in self._peft.peft_config

    def _bridge(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter's bridge under the names they have beside the updates that are there now."""
        tensors = {n: t for n, t in read_tensors(self._folders[name]).items() if not is_lora(n)}
        parameters = {n.replace(".base_layer.", "."): n for n, _ in self.model.named_parameters()}
        return {parameters[n.replace(".base_layer.", ".")]: tensor for n, tensor in tensors.items()}

    def _check_known(self, name: str) -> None:
        if name not in self._folders:
            raise UserError(f"no adapter named {name}; loaded are {', '.join(self._folders)}")


def check_same_base(folder: Path, base: FlamingoConfig, found: FlamingoConfig) -> None:
    """Refuse an adapter whose base is another, in backbones, bridge or what it holds of the bridge."""
    for part in ("vision", "language"):
        check_backbone(folder, part, found.backbones[part], base.backbones[part])
    for key in GEOMETRY:
        if getattr(found, key) != getattr(base, key):
            raise UserError(
                f"{folder}: adapter of another base: {key} {getattr(found, key)}, here {getattr(base, key)}"
            )
    if found.vision_preprocess != base.vision_preprocess:
        raise UserError(
            f"{folder}: adapter of other images: it has its own size or transform; load it by itself"
        )
    starts = [(config.bridge_init or {}).get("sha256") for config in (found, base)]
    if starts[0] != starts[1] or parts_in_adapter(found) != parts_in_adapter(base):
        raise UserError(f"{folder}: adapter of another base: it builds on another bridge; load it by itself")
