"""transformers' image-text-to-text pipeline, with answers of a Flamingo as `flamingo-ft generate` gives them.

With many tokenizers an answer's first token begins with a space. A pipeline cuts the prompt off the decoded text, and
the space stays with the answer.
"""

from __future__ import annotations

from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline, ReturnType

from .configuration import FlamingoConfig

TASK = "image-text-to-text"


class AnswerPipeline(ImageTextToTextPipeline):
    """The pipeline that it derives from; a Flamingo's answers have no white space around them.

    Text that continues the caller's (a raw text in full, a last message of the assistant's) keeps its spaces.
    """

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        continue_final_message: bool | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """One record for each text that was generated."""
        records = super().postprocess(model_outputs, return_type, continue_final_message, **options)
        if self.model.config.model_type != FlamingoConfig.model_type or return_type == ReturnType.TENSORS:
            return records
        return [
            record if _continues(record, return_type, continue_final_message) else _stripped(record)
            for record in records
        ]


def use_answer_pipeline() -> None:
    """Let ``pipeline("image-text-to-text")`` be the one above: which it is goes by the task, not by the model."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = AnswerPipeline


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
