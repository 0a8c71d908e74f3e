"""Parameter-efficient fine-tuning of Flamingo-style vision-language models.

A Flamingo (arXiv:2204.14198) is a frozen vision tower and a frozen causal language model with a small
trainable bridge between them. A recipe (a YAML file) says what to train on which data. A run ends with an
adapter, a folder in PEFT's format, which answers prompts and merges into a standalone model:

    import flamingo_ft

    recipe = flamingo_ft.load_recipe("quickstart", ["train.output_dir=runs/quickstart"])
    metrics = flamingo_ft.train(recipe)
    predictor = flamingo_ft.load("runs/quickstart")
    print(predictor("digit.png", "Which digit is this?"))

Train
    load_recipe                        read and validate a recipe, with values of keys to override
    train                              train as a recipe says, evaluate, save the adapter and a report

Answer
    load                               load an adapter or a merged model, from a folder or the Hub
    Predictor                          what it returns: answers, streams, ranks labels, shows where it looks

Adapters
    load_adapter                       the trained model and its processor
    load_base                          the model that an adapter was trained on, for PeftModel.from_pretrained
    save_adapter                       write the trainable parameters of a model
    Adapters                           several adapters on one base: switch, combine, replace
    merge_adapter                      write a standalone model and verify it against the adapter

Build a model
    load_vision                        load a frozen OpenCLIP or timm tower
    load_language                      load a frozen causal language model of transformers
    Quantization                       the format of their matrices: int8, nf4 or fp4
    build_flamingo                     join both by a new bridge; returns a model and its processor
    FlamingoForConditionalGeneration   the model, with transformers' interface
    FlamingoConfig                     its configuration
    FlamingoProcessor                  its processor: texts and images to tensors
    FlamingoImageProcessor             the part for images: the tower's own transform, and tiles

The Hub
    push                               upload an adapter or a merged model with a card
    write_composition                  write an adapter's base as a small repository of its own
    name_base                          make an adapter refer to such a base

OpenFlamingo and Otter
    create_model_and_transforms        OpenFlamingo's function, for scripts that were written for it
    Flamingo                           the model that it returns, with OpenFlamingo's interface
    load_open_flamingo                 load a checkpoint of theirs into a model
    import_checkpoint                  convert a checkpoint of theirs to an adapter or a model
    export_open_flamingo               convert an adapter or a model to a checkpoint of OpenFlamingo
    export_otter                       convert an adapter or a model to a folder of Otter

Errors
    UserError                          invalid input; one line per problem: where, what, got what, remedy

Names are imported when they are first used, so that `import flamingo_ft` takes a moment and does not import
torch. It registers the model with transformers' Auto classes, whichever of the two is imported first. The
command `flamingo-ft` does the same jobs; README.md and `recipes/GUIDE.md` explain them.
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
