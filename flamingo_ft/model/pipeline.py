"""transformers' pipeline for images and text, reading a Flamingo's images as training reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from .image_source import read_image
from .processor import FlamingoProcessor

TASK = "image-text-to-text"


class FlamingoPipeline(ImageTextToTextPipeline):
    """The task's pipeline for every model; for a Flamingo, images beside the text are read here.

    transformers would convert them to RGB before the processor sees them: 16 bits clipped, transparency dropped.
    """

    def preprocess(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.processor, FlamingoProcessor) and isinstance(inputs, Mapping) and "images" in inputs:
            inputs = {**inputs, "images": _read_all(inputs["images"])}
        return super().preprocess(inputs, *args, **kwargs)


def register_pipeline() -> None:
    """Let ``transformers.pipeline("image-text-to-text")`` make this pipeline."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = FlamingoPipeline


def _read_all(images: Any) -> Any:
    """An image, or lists of them in any depth."""
    return [_read_all(one) for one in images] if isinstance(images, (list, tuple)) else read_image(images)
