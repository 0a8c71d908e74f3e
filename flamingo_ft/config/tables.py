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
    and documentation call it; short: its name in tables. module: the model's attribute that holds it. trainable: default
    of its switch in ``trainable``; None for a backbone, which is frozen or gets LoRA. takes_lora: whether it has linear
    layers, which may get LoRA and be quantized while they are frozen. decays: whether it has matrices that weight decay
    is for; undecayed: parameters of ``module`` that are matrices by shape only, and are not decayed.
    """

    name: str
    label: str
    short: str
    module: str
    trainable: bool | None
    takes_lora: bool = True
    decays: bool = True
    undecayed: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What the names of its parameters begin with."""
        return f"{self.module}."


PERCEIVER = Part(
    "perceiver",
    label="perceiver resampler",
    short="perceiver",
    module="perceiver",
    trainable=True,
    undecayed=("latents", "frame_embs", "media_time_embs"),
)
CROSS_ATTENTION = Part(
    "cross_attention",
    label="gated cross-attention blocks",
    short="cross-attention",
    module="gated_cross_attn_layers",
    trainable=True,
)
NEW_TOKENS = Part(
    "new_tokens",
    label="embedding rows of the new tokens",
    short="new tokens",
    module="token_rows",
    trainable=True,
    takes_lora=False,
    decays=False,
)
LANGUAGE = Part(
    "language", label="language model", short="language model", module="lang_encoder", trainable=None
)
VISION = Part("vision", label="vision tower", short="vision tower", module="vision_encoder", trainable=None)

# A trainable part is added here, in one row: recipe keys, trainable set, adapter, optimizer, plan and card follow.
BRIDGE_PARTS = (PERCEIVER, CROSS_ATTENTION, NEW_TOKENS)
BACKBONE_PARTS = (LANGUAGE, VISION)
# The parts that `lora` names, in its order: the first that a recipe gives LoRA sets the rank of peft.LoraConfig.
LORA_PARTS = (LANGUAGE, CROSS_ATTENTION, PERCEIVER, VISION)

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
