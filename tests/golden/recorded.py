"""Reading what record_open_flamingo.py wrote. Needs no peer."""

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
    """What was recorded of one family at one interval."""

    def __init__(self, family: str, every: int):
        self.every = every
        with safe_open(FOLDER / f"{family}.safetensors", framework="pt") as file:
            prefix = f"every{every}."
            self.tensors = {
                k.removeprefix(prefix): file.get_tensor(k) for k in list(file.keys()) if k.startswith(prefix)
            }
            self.gradient_names = json.loads(file.metadata()["about"])["gradients"][str(every)]

    def distance(self, name: str, value: Tensor) -> float:
        """How far `value` is from the recorded tensor, in units of that one's largest magnitude."""
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
    """What OpenFlamingo's training saves of this family's model: perceiver, cross-attention, embeddings."""
    return _tensors("trained", family)


def whole_state_dict() -> dict[str, Tensor]:
    """The whole `state_dict()` of the GPT-NeoX model: cross-attention and layers under two names each."""
    return _tensors("whole", "gpt_neox")
