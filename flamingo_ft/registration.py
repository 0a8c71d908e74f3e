"""Makes transformers' Auto classes know the Flamingo, without importing transformers for a command's help.

Registering needs the model's class, and with it torch and transformers: seconds. So it waits until transformers is imported
by whoever needs it, and then happens at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTERS = "flamingo_ft.model"  # importing it registers


def register_with_transformers() -> None:
    """Register now where transformers is imported already, else as soon as it is."""
    if "transformers" in sys.modules:
        import_module(REGISTERS)
    else:
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as Python does, and registers once it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if not _importing_this_package():
            import_module(REGISTERS)


def _importing_this_package() -> bool:
    """Whether a part of this package is being imported, and needs transformers for it; most parts import the model."""
    parts = (module for name, module in list(sys.modules.items()) if name.startswith("flamingo_ft."))
    return any(getattr(getattr(part, "__spec__", None), "_initializing", False) for part in parts)
