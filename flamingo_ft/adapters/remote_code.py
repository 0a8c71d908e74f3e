"""Write the package's code beside a merged model, to load it with ``trust_remote_code`` instead.

``auto_map`` in the model's configuration names the classes and their files. transformers needs all files in
one folder, importing each other relatively. The modules that configuration, model and processor need are
collected by following their imports, and each is written under a name made of its path in the package.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import flamingo_ft.errors

from .card import CARD

PACKAGE = Path(flamingo_ft.errors.__file__).parent
ROOT = PACKAGE.name

CONFIG, MODEL, PROCESSOR = (f"{ROOT}.model.{name}" for name in ("configuration", "modeling", "processor"))
WITHOUT_THE_PACKAGE = """
## Without flamingo_ft

The code that the model needs is in this folder. With `transformers` and `open_clip_torch` installed, and if
you trust the code:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="this/folder", trust_remote_code=True)
```
"""
# (file, key in it) with an auto_map -> Auto class -> (module, class).
AUTO_MAPS = {
    ("config.json", None): {
        "AutoConfig": (CONFIG, "FlamingoConfig"),
        "AutoModelForImageTextToText": (MODEL, "FlamingoForConditionalGeneration"),
    },
    ("processor_config.json", None): {"AutoProcessor": (PROCESSOR, "FlamingoProcessor")},
    ("processor_config.json", "image_processor"): {
        "AutoImageProcessor": (PROCESSOR, "FlamingoImageProcessor")
    },
}


def write_code(folder: Path) -> None:
    """Write the code beside the model in ``folder`` and its classes into ``auto_map``."""
    for (file, part), classes in AUTO_MAPS.items():
        path = folder / file
        values = json.loads(path.read_text(encoding="utf-8"))
        (values if part is None else values[part])["auto_map"] = {
            auto: f"{flat_name(module)}.{name}" for auto, (module, name) in classes.items()
        }
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for module in needed([CONFIG, MODEL, PROCESSOR]):
        (folder / f"{flat_name(module)}.py").write_text(flattened(module), encoding="utf-8")
    with (folder / CARD).open("a", encoding="utf-8") as card:
        card.write(WITHOUT_THE_PACKAGE)


def needed(modules: list[str]) -> list[str]:
    """Return the modules of the package that ``modules`` need, themselves first."""
    collected = list(dict.fromkeys(modules))
    for module in collected:  # grows in the loop
        used = (home for _, names in own_imports(module) for home in names)
        collected += dict.fromkeys(home for home in used if home not in collected)
    return collected


def flattened(module: str) -> str:
    """Return the module's source with imports of the package rewritten as from files of one folder."""
    lines = _source(module).splitlines()
    for node, names in sorted(own_imports(module), key=lambda entry: -entry[0].lineno):
        indent = " " * node.col_offset
        new = [f"{indent}from .{flat_name(home)} import {', '.join(taken)}" for home, taken in names.items()]
        lines[node.lineno - 1 : node.end_lineno] = new
    return "\n".join(lines) + "\n"


def own_imports(module: str) -> Iterator[tuple[ast.ImportFrom, dict[str, list[str]]]]:
    """Yield the imports from the package in a module, each with its names by the module that defines them."""
    parent = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(_source(module))):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = parent.split(".")[: len(parent.split(".")) - node.level + 1] if node.level else []
        place = ".".join([*above, *filter(None, [node.module])])
        if place.split(".")[0] == ROOT:
            names: dict[str, list[str]] = {}
            for alias in node.names:
                home = _home(place, alias.name)
                names.setdefault(home, []).append(ast.unparse(alias))
            yield node, names


def flat_name(module: str) -> str:
    """``flamingo_ft.model.core`` -> ``flamingo_model_core``."""
    return "_".join(["flamingo", *module.split(".")[1:]])


def _home(place: str, name: str) -> str:
    """Return the module that defines a name that is imported from ``place``, a module or a package."""
    if not _path(place).is_dir():
        return place
    package = f"{place}.__init__"
    return next(home for _, names in own_imports(package) for home, taken in names.items() if name in taken)


def _path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:])


def _source(module: str) -> str:
    return _path(module).with_suffix(".py").read_text(encoding="utf-8")
