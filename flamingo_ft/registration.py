"""Register the Flamingo with transformers: Auto classes, pipeline, and adapters in ``from_pretrained``.

`register` needs the model, and with it torch and transformers, which take seconds to import. A command's help
needs neither, so registration waits until transformers is imported, by whom ever. The Auto classes are looked
up by name in any program that has imported both packages, so there is no call of ours to wait for, and
transformers has no entry points for plugins: hence the import hook.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register now if transformers is imported already, otherwise right after its import."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


def register() -> None:
    """Make transformers' Auto classes and pipeline know the Flamingo, and ``from_pretrained`` load adapters
    of it.

    Where a dependency of the package is missing, warn only: the import of transformers must not fail for it.
    """
    try:
        import flamingo_ft.adapters  # noqa: F401 (on import, it lets the model's from_pretrained load adapters)
        from flamingo_ft import model
        from flamingo_ft.model.pipeline import register_pipeline
    except ImportError as error:
        warnings.warn(f"transformers' Auto classes will not know the Flamingo: {error}", stacklevel=2)
        return
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    config = model.FlamingoConfig
    AutoConfig.register(config.model_type, config)
    AutoModelForImageTextToText.register(config, model.FlamingoForConditionalGeneration)
    AutoImageProcessor.register(config, image_processor_classes={"torchvision": model.FlamingoImageProcessor})
    AutoProcessor.register(config, model.FlamingoProcessor)
    register_pipeline()


class _AfterTransformers(MetaPathFinder):
    """Calls `register` after the import of transformers, or of this package's module that imported it."""

    def __init__(self) -> None:
        self._here = threading.local()  # each thread imports on its own

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders find, its loader made to call `_execute`."""
        if name != "transformers" and not name.startswith("flamingo_ft."):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._execute(execute, module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Execute a module; after the outermost one, register if transformers has been imported."""
        depth = getattr(self._here, "depth", 0)
        self._here.depth = depth + 1
        try:
            execute(module)
        finally:
            self._here.depth = depth
        if depth == 0 and "transformers" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()
