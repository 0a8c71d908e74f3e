"""transformers' image-text-to-text pipeline for a Flamingo: images read as training reads them, answers
without the space that they begin with.

transformers converts images to RGB before the processor sees them: 16 bits clipped, transparency dropped. And
it cuts the prompt off the decoded text, where the space before an answer's first word stays with the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ImageTextToTextPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .compat import ReturnType
from .image_source import read_image
from .processor import FlamingoProcessor

TASK = "image-text-to-text"


class FlamingoPipeline(ImageTextToTextPipeline):
    """The task's pipeline for every model; only for a Flamingo it is another than the one that it derives
    from.

    Text that continues the caller's (a raw text in full, a last message of the assistant's) keeps its spaces.
    """

    def preprocess(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self._is_flamingo() and isinstance(inputs, Mapping) and "images" in inputs:
            inputs = {**inputs, "images": _read_all(inputs["images"])}
        return super().preprocess(inputs, *args, **kwargs)

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        continue_final_message: bool | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """One record for each text that was generated."""
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
    """Let ``transformers.pipeline("image-text-to-text")`` make this pipeline, which goes by the task, not by
    the model.
    """
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = FlamingoPipeline


def _read_all(images: Any) -> Any:
    """An image, or lists of them in any depth."""
    return [_read_all(one) for one in images] if isinstance(images, (list, tuple)) else read_image(images)


def _continues(record: dict[str, Any], return_type: ReturnType, continue_final_message: bool | None) -> bool:
    given = record["input_text"]
    if isinstance(given, str):
        return return_type == ReturnType.FULL_TEXT
    return given[-1]["role"] == "assistant" if continue_final_message is None else continue_final_message


def _stripped(record: dict[str, Any]) -> dict[str, Any]:
    generated = record["generated_text"]
    if isinstance(generated, str):
        return {**record, "generated_text": generated.strip()}
    *before, answer = generated
    content = answer.get("content")
    answer = {**answer, "content": content.strip()} if isinstance(content, str) else answer
    return {**record, "generated_text": [*before, answer]}
