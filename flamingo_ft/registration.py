"""Makes transformers' Auto classes know the Flamingo, without importing transformers for a command's help.

Registering needs the model's class, and with it torch and transformers: seconds. So it waits until
transformers is imported by whoever needs it, and then happens at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERS = "flamingo_ft.model"  # importing it registers


def register_with_transformers() -> None:
    """Register now where transformers is imported already, else as soon as it is."""
    if "transformers" in sys.modules:
        register_now()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as the finders after it do, and registers once it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader, finder: _AfterTransformers):
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute, then register; not inside an import of this package, every part of which registers by
        itself."""
        sys.meta_path.remove(self._finder)
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if not _importing_this_package():
            register_now()


def register_now() -> None:
    """Import what registers. Where that fails, transformers goes on without the Flamingo, and says why."""
    try:
        import_module(REGISTERS)
    except ImportError as error:
        warnings.warn(f"transformers' Auto classes will not know the Flamingo: {error}", stacklevel=2)


def _importing_this_package() -> bool:
    parts = (module for name, module in list(sys.modules.items()) if name.startswith("flamingo_ft."))
    return any(getattr(getattr(part, "__spec__", None), "_initializing", False) for part in parts)
