"""Plain data of what a recipe can name: parts of the model, formats of data, metrics.

Only names, labels and defaults are here, so that a recipe is checked without importing torch. What a part, format or
metric does is attached to its name in the folder that owns it: `model`, `data` and `evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the model that can be trained.

    name: its key in ``trainable``, ``lora``, ``train.learning_rates`` and ``train.weight_decays``. label: what messages
    and documentation call it. trainable: default of its switch in ``trainable``; None for a part that stays frozen or gets
    LoRA. takes_lora: whether it may have a section in ``lora``. decays: whether it has matrices that weight decay is for.
    """

    name: str
    label: str
    trainable: bool | None
    takes_lora: bool = True
    decays: bool = True


PERCEIVER = Part("perceiver", "perceiver resampler", trainable=True)
CROSS_ATTENTION = Part("cross_attention", "gated cross-attention blocks", trainable=True)
NEW_TOKENS = Part(
    "new_tokens", "embedding rows of the new tokens", trainable=True, takes_lora=False, decays=False
)
LANGUAGE = Part("language", "language model", trainable=None)
VISION = Part("vision", "vision tower", trainable=None)

BRIDGE_PARTS = (PERCEIVER, CROSS_ATTENTION, NEW_TOKENS)
LORA_PARTS = (
    LANGUAGE,
    CROSS_ATTENTION,
    PERCEIVER,
    VISION,
)  # the first that a recipe names sets LoraConfig's own rank

# Schema of a dataset's rows -> the columns it is recognised by, tried in this order: the first that fits is used. A
# preference pair has a prompt too, and an instruction of MIMIC-IT an answer.
DATASET_FORMATS = {
    "preference": "prompt, chosen, rejected",
    "messages": "messages and images",
    "llava": "conversations of human and gpt, image",
    "sharegpt": "conversations of from and value or role and content, images",
    "mimicit": "instruction, answer, image_ids",
    "alpaca": "instruction, output, image",
    "prompt_completion": "prompt, completion, images",
    "interleaved": "text_list and image_info, or texts and images",
    "vqa": "question, answer or answers, image",
    "caption": "image, caption or text",
}

# Metric that eval.metric can name -> what it measures. `evaluation` registers further ones here.
METRICS = {
    "loss": "cross-entropy of the reference answers, in nats per token; lower is better",
    "accuracy": "fraction of generated answers that equal the reference answer; higher is better",
}
