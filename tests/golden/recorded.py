"""Read the numbers that record_open_flamingo.py wrote; OpenFlamingo need not be installed."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tests.golden.deterministic_weights import parameter_values
from tests.golden.measurements import LOGIT_BUCKETS
from tests.golden.sketch import sketch

FOLDER = Path(__file__).parent / "open_flamingo"
TOLERANCE = 1e-5  # of the largest magnitude in the tensor
CHECKPOINT_INTERVAL = 2  # cross_attn_every_n_layers of the recorded checkpoints


class Golden:
    """The recorded numbers of one family at one cross-attention interval."""

    def __init__(self, family: str, every: int):
        self.every = every
        with safe_open(FOLDER / f"{family}.safetensors", framework="pt") as file:
            prefix = f"every{every}."
            self.tensors = {
                k.removeprefix(prefix): file.get_tensor(k) for k in list(file.keys()) if k.startswith(prefix)
            }
            self.gradient_names = json.loads(file.metadata()["about"])["gradients"][str(every)]

    def distance(self, name: str, value: Tensor) -> float:
        """Return the distance of `value` from the recorded tensor, as a fraction of its largest magnitude."""
        recorded, largest = self.tensors[name], self.tensors.get(f"{name}.largest")
        if largest is None:
            largest = recorded.abs().max()
        else:
            value = sketch(value, LOGIT_BUCKETS)
        return float((value.double() - recorded.double()).abs().max() / largest)


def _tensors(section: str, family: str) -> dict[str, Tensor]:
    keys = json.loads((FOLDER / "checkpoint_keys.json").read_text())
    entries = keys["perceiver"] | keys[section][family]
    return {key: parameter_values(name, tuple(shape)) for key, (name, shape) in entries.items()}


def trained_state_dict(family: str) -> dict[str, Tensor]:
    """Return what OpenFlamingo's training saves for a family: perceiver, cross-attention, embeddings."""
    return _tensors("trained", family)


def whole_state_dict() -> dict[str, Tensor]:
    """Return the `state_dict()` of the GPT-NeoX model; cross-attention and layers have two names each."""
    return _tensors("whole", "gpt_neox")
