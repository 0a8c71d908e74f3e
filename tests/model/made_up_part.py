"""Train, save, load and plan a Flamingo with one more trainable part, added in one row; run by `test_parts`
in a process of its own, since the keys of a recipe are made from the table when `flamingo_ft.config` is
imported.

Prints the result as JSON. The module of the part shifts the embedded text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import flamingo_ft

NAME = "flamingo_ft.config.tables"
spec = importlib.util.spec_from_file_location(
    NAME, Path(flamingo_ft.__file__).parent / "config" / "tables.py"
)
tables = sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
ROW = tables.Part(
    "text_shift",
    label="made-up shift of the text",
    short="text shift",
    module="text_shift",
    trainable=True,
    takes_lora=False,
    undecayed=("start",),
)
tables.BRIDGE_PARTS = (*tables.BRIDGE_PARTS, ROW)

import torch  # noqa: E402 (the table comes first)
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from flamingo_ft.adapters import load_adapter, save_adapter, trainable_parameters  # noqa: E402
from flamingo_ft.model.core import FlamingoCore  # noqa: E402
from flamingo_ft.plan import plan_memory  # noqa: E402
from flamingo_ft.training.optimizer import parameter_groups  # noqa: E402
from tests import regimes  # noqa: E402


class TextShift(nn.Module):
    """x -> x + W x + start."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.start = nn.Parameter(torch.zeros(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight + self.start


build_bridge = FlamingoCore.build_bridge


def build_with_text_shift(self: FlamingoCore, **options) -> None:
    build_bridge(self, **options)
    embedding = self.lang_encoder.get_input_embeddings()
    self.text_shift = TextShift(embedding.embedding_dim)
    embedding.register_forward_hook(lambda module, args, embedded: self.text_shift(embedded))


FlamingoCore.build_bridge = build_with_text_shift

OTHERS = "trainable={perceiver: false, cross_attention: false, new_tokens: false}"
RATES = (
    OTHERS,
    "train.learning_rates.text_shift=0.5",
    "train.weight_decays.text_shift=0.25",
    "train.weight_decay=0.1",
)


def main(folder: Path) -> None:
    os.chdir(folder)
    regimes.write_run(folder)
    recipe = regimes.recipe(*RATES)
    model, processor = regimes.build(*RATES)
    groups = parameter_groups(model, recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = {
        "trainable": [*trainable_parameters(model)],
        "parameters": sum(p.numel() for p in trainable_parameters(model).values()),
        "groups": [
            [group["name"], group["lr"], group["weight_decay"], [names[id(p)] for p in group["params"]]]
            for group in groups
        ],
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    regimes.trainer(model, processor, *RATES).train()
    result["moved"] = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    save_adapter(model, processor, folder / "adapter")
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    result["saved"] = [name for name in stored if "text_shift" in name]
    result["card"] = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    loaded, _ = load_adapter(folder / "adapter")
    result["loaded"] = torch.equal(loaded.text_shift.weight, model.text_shift.weight)
    plan = plan_memory(recipe, device="cpu", text_tokens=8, images=1)
    result["plan"] = {part.name: part.trainable_parameters for part in plan.components}
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
