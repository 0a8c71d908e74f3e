"""Parameter-efficient fine-tuning of Flamingo-style vision-language models.

The names below come from their modules when first used, so that importing the package is quick. transformers'
Auto classes know the Flamingo from then on, whichever of the two is imported first.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

from flamingo_ft.registration import register_with_transformers
from flamingo_ft.version import __version__

# Before torch starts its threads: spinning while they wait makes a training step 15 times slower on a machine
# of two cores that does anything else (measured: 30 steps of the quickstart in 106 s against 7 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# On a CPU, bitsandbytes recommends at every start a package that would download its kernels at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# bitsandbytes warns at every product of an 8-bit matrix with a tensor that is not float16 that it casts the
# tensor to float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

_HOMES = {
    "Adapters": "flamingo_ft.adapters",
    "Flamingo": "flamingo_ft.model",
    "FlamingoConfig": "flamingo_ft.model",
    "FlamingoForConditionalGeneration": "flamingo_ft.model",
    "FlamingoImageProcessor": "flamingo_ft.model",
    "FlamingoProcessor": "flamingo_ft.model",
    "Predictor": "flamingo_ft.inference.predictor",
    "Quantization": "flamingo_ft.backbones.quantization",
    "UserError": "flamingo_ft.errors",
    "build_flamingo": "flamingo_ft.model",
    "create_model_and_transforms": "flamingo_ft.model",
    "export_open_flamingo": "flamingo_ft.convert",
    "export_otter": "flamingo_ft.convert",
    "import_checkpoint": "flamingo_ft.convert",
    "load": "flamingo_ft.inference.predictor",
    "load_adapter": "flamingo_ft.adapters",
    "load_base": "flamingo_ft.adapters",
    "load_language": "flamingo_ft.backbones.language",
    "load_open_flamingo": "flamingo_ft.model",
    "load_recipe": "flamingo_ft.config",
    "load_vision": "flamingo_ft.backbones.vision",
    "merge_adapter": "flamingo_ft.evaluation.merging",
    "name_base": "flamingo_ft.adapters",
    "push": "flamingo_ft.publish",
    "save_adapter": "flamingo_ft.adapters",
    "train": "flamingo_ft.training.train",
    "write_composition": "flamingo_ft.adapters",
}

__all__ = ["__version__", *_HOMES]  # pyrefly: ignore[unresolvable-dunder-all]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
