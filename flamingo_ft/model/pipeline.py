"""transformers' image-text-to-text pipeline for a Flamingo: images read as in training, answers stripped.

transformers converts images to RGB before the processor sees them, which clips 16 bits and drops
transparency. It also cuts the prompt off the decoded text, which leaves the space before an answer's first
word with the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ImageTextToTextPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .compat import ReturnType
from .images import read_image
from .processor import FlamingoProcessor

TASK = "image-text-to-text"


class FlamingoPipeline(ImageTextToTextPipeline):
    """The task's pipeline for all models; it behaves differently for a Flamingo only.

    Text that continues the caller's (full text, or a last message of the assistant's) keeps its spaces.
    """

    def preprocess(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self._is_flamingo() and isinstance(inputs, Mapping) and "images" in inputs:
            inputs = {**inputs, "images": _read_all(inputs["images"])}
        return super().preprocess(inputs, *args, **kwargs)

    # pyrefly: ignore[bad-override]
    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        continue_final_message: bool | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Return one record per generated text."""
        records = super().postprocess(model_outputs, return_type, continue_final_message, **options)
        if not self._is_flamingo() or return_type == ReturnType.TENSORS:
            return records
        return [
            record if _continues(record, return_type, continue_final_message) else _stripped(record)
            for record in records
        ]

    def _is_flamingo(self) -> bool:
        return isinstance(self.processor, FlamingoProcessor)


def register_pipeline() -> None:
    """Make ``transformers.pipeline("image-text-to-text")`` use this class; the task alone chooses it."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = FlamingoPipeline


def _read_all(images: Any) -> Any:
    """Read an image, or arbitrarily nested lists of images."""
    return [_read_all(one) for one in images] if isinstance(images, (list, tuple)) else read_image(images)


def _continues(record: dict[str, Any], return_type: ReturnType, continue_final_message: bool | None) -> bool:
    prompt = record["input_text"]
    if isinstance(prompt, str):
        return return_type == ReturnType.FULL_TEXT
    return prompt[-1]["role"] == "assistant" if continue_final_message is None else continue_final_message


def _stripped(record: dict[str, Any]) -> dict[str, Any]:
    generated = record["generated_text"]
    if isinstance(generated, str):
        return {**record, "generated_text": generated.strip()}
    *before, answer = generated
    content = answer.get("content")
    answer = {**answer, "content": content.strip()} if isinstance(content, str) else answer
    return {**record, "generated_text": [*before, answer]}
