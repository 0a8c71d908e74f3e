"""The language model inside a vision-language checkpoint, such as Gemma 3 4B, Qwen3.5 4B or Ministral 3.

Such a checkpoint is loaded as the causal language model that transformers has for its text configuration. Its
own tower and projector stay in the file.
"""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

# Names in a vision-language checkpoint, as old and new versions of transformers write them, to those of the
# language model alone.
KEY_MAPPING = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the causal language model in ``config``; else ``config`` itself.

    Embeddings are tied if either of the two says so: some checkpoints state it in one, and transformers does
    not tie two matrices that are both in the file and differ. The record of a quantized checkpoint goes with
    it, so that it is not quantized again.
    """
    text = config.get_text_config()
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    text.tie_word_embeddings |= config.tie_word_embeddings
    if (stored := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = stored
    return text


def record_tying(model: PreTrainedModel) -> None:
    """Make the configuration say whether the loaded model's head shares the matrix of its embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = getattr(head, "weight", None) is embeddings.weight
