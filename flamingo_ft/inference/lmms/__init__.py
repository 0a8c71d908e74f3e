"""A plug-in with which lmms-eval evaluates a model of this package, as ``--model flamingo_ft``.

lmms-eval finds `manifest` by the entry point in pyproject.toml and imports `models`, which needs lmms-eval,
when the model is chosen. Written for lmms-eval 0.7.3.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "flamingo_ft"


def manifest() -> Any:
    """Return lmms-eval's ``ModelManifest`` of both classes, for chat messages and for plain text.

    lmms-eval chooses the first; ``--force_simple`` chooses the second, which log-likelihood tasks need.
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyrefly: ignore[missing-import]

    return ModelManifest(
        model_id=MODEL_ID,
        chat_class_path=f"{__name__}.models.ChatFlamingo",
        simple_class_path=f"{__name__}.models.SimpleFlamingo",
    )
