"""Tables behind the keys of a recipe: parts of the model, dataset formats, metrics, keys of other trainers.

Only names, labels and defaults are here, so that a recipe is validated without importing torch. What a part,
format or metric does is attached to its name in the folder that owns it: `model`, `data` and `evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the model that can be trained.

    name: its key under ``trainable``, ``lora``, ``train.learning_rates`` and ``train.weight_decays`` (where
        applicable).
    label: its name in messages and documentation.
    short: its name in tables.
    module: the model's attribute that holds it.
    trainable: the default of its key in ``trainable``; None for a backbone, which is never trained in full.
    takes_lora: whether it has linear layers, which can get LoRA, or be quantized while they are frozen.
    decays: whether it has matrices that weight decay applies to.
    undecayed: parameters of ``module`` that have two or more dimensions but are not decayed.
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
    undecayed=("latents", "frame_embs", "media_time_embs", "tile_embs"),
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

# To add a trainable part, add its row here: recipe keys, trainable parameters, adapter, optimizer, plan and
# card follow.
BRIDGE_PARTS = (PERCEIVER, CROSS_ATTENTION, NEW_TOKENS)
BACKBONE_PARTS = (LANGUAGE, VISION)
# In the order of `lora`'s keys. Stored adapters depend on it: the first part with LoRA sets the rank in
# peft.LoraConfig.
LORA_PARTS = (LANGUAGE, *(part for part in reversed(BRIDGE_PARTS) if part.takes_lora), VISION)

# Format of a dataset's rows -> its columns, as shown in messages. The order is the detection priority:
# preference pairs also have a prompt, labelled answers a completion, and MIMIC-IT's instructions an answer.
DATASET_FORMATS = {
    "preference": "prompt, chosen, rejected",
    "messages": "messages and images",
    "llava": "conversations of human and gpt, image",
    "sharegpt": "conversations of from and value or role and content, images",
    "mimicit": "instruction, answer, image_ids",
    "alpaca": "instruction, output, image",
    "unpaired_preference": "prompt, completion, label, images",
    "prompt_completion": "prompt, completion, images",
    "cauldron": "texts (pairs of user and assistant), images",
    "interleaved": "text_list and image_info, or texts and images",
    "vqa": "question, answer or answers, image",
    "caption": "image, caption or text",
}

# Value of `eval.metric` and, except for loss, of `eval.metrics` -> what it measures. Built-in metrics must be
# listed here, because the schema is generated without importing the registry;
# `flamingo_ft.evaluation.metrics.register_metric` adds metrics registered at run time.
_TOKENS = {"": "plain tokens, not the official ones", "_ptb": "official tokens (needs the extra `metrics`)"}
METRIC_DESCRIPTIONS = {
    "loss": "cross-entropy of the reference answers, in nats per token; lower is better",
    "accuracy": "fraction of generated answers that equal a reference answer; of answers with boxes, iou_50; "
    "higher is better",
    "vqa_accuracy": "official VQA accuracy against the answers of several people; higher is better",
    "anls": "similarity of characters to the nearest reference answer; higher is better",
    **{f"cider_d{suffix}": f"CIDEr-D with {tokens}; higher is better" for suffix, tokens in _TOKENS.items()},
    **{
        f"bleu_{n}{suffix}": f"BLEU-{n} with {tokens}; higher is better"
        for n in (1, 2, 3, 4)
        for suffix, tokens in _TOKENS.items()
    },
    **{f"rouge_l{suffix}": f"ROUGE-L with {tokens}; higher is better" for suffix, tokens in _TOKENS.items()},
    "meteor": "METEOR 1.5 (needs the extra `metrics`); higher is better",
    "f1": "F1 of the answers yes and true; higher is better",
    "macro_f1": "mean F1 of the distinct reference answers as classes; higher is better",
    "roc_auc": "area under the ROC curve of two ranked labels; higher is better",
    "top_5": "reference answer among the five best ranked labels; higher is better",
    "iou": "mean intersection over union of boxes with those of the reference answer; higher is better",
    "iou_50": "share of boxes with an IoU of at least 0.5 (Acc@0.5 of RefCOCO); higher is better",
}

# Metrics that can be `train.grpo.reward`, and why others cannot.
REWARDS = (
    "accuracy",
    "vqa_accuracy",
    "anls",
    "rouge_l",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "iou",
    "iou_50",
)
UNSUITABLE_REWARDS = {
    **{
        name: "runs Java, which is too slow to score every sampled answer"
        for name in METRIC_DESCRIPTIONS
        if name.endswith("_ptb") or name == "meteor"
    },
    **dict.fromkeys(("cider_d", "f1", "macro_f1"), "scores all answers together, not each by itself"),
    **dict.fromkeys(("roc_auc", "top_5"), "ranks given labels, and no answer is sampled for it"),
}

# Keys of other trainers' configurations, in lower case -> the key of a recipe to suggest in their place, with
# entries of a list under index 0. None of them is spelled like a key of a recipe.
FOREIGN_KEYS = {
    # transformers' TrainingArguments
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "num_steps": "train.max_steps",
    "total_steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "iterations": "train.max_steps",
    "lr": "train.learning_rate",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "grad_accum": "train.gradient_accumulation_steps",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "warmup_proportion": "train.warmup_ratio",
    "num_warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler",
    "scheduler": "train.lr_scheduler",
    "optim": "train.optimizer",
    "clip_grad": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm",
    "eval_steps": "eval.steps",
    "metric_for_best_model": "eval.metric",
    "load_best_model_at_end": "eval.keep",
    "save_interval": "train.save_steps",
    "log_interval": "train.logging_steps",
    "dataloader_num_workers": "train.num_workers",
    "workers": "train.num_workers",
    "random_seed": "train.seed",
    "hub_model_id": "train.push_to_hub",
    "output": "train.output_dir",
    "out_dir": "train.output_dir",
    "save_dir": "train.output_dir",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "tf32": "train.precision",
    "mixed_precision": "train.precision",
    "torch_dtype": "trainable.dtype",
    "max_completion_length": "train.grpo.max_completion_tokens",
    "reward_funcs": "train.grpo.reward",
    # models and quantization
    "model_name_or_path": "model.language.name",
    "model_id": "model.language.name",
    "base_model": "model.language.name",
    "lang_encoder_path": "model.language.name",
    "llm": "model.language",
    "vision_encoder_path": "model.vision.name",
    "vision_tower": "model.vision.name",
    "vision_encoder_pretrained": "model.vision.pretrained",
    "resume_from_checkpoint": "model.init_from",
    "checkpoint": "model.init_from",
    "pretrained_checkpoint": "model.init_from",
    "load_in_4bit": "model.language.quantization",
    "load_in_8bit": "model.language.quantization",
    "bnb_4bit_quant_type": "model.language.quantization",
    "bnb_4bit_use_double_quant": "model.language.double_quantization",
    "bnb_4bit_compute_dtype": "model.language.compute_dtype",
    # PEFT
    "lora_r": "lora.language.r",
    "lora_rank": "lora.language.r",
    "rank": "lora.language.r",
    "alpha": "lora.language.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.language.target_modules",
    "peft": "lora",
    "peft_config": "lora",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train.0.hub",
    "dataset_path": "data.train.0.path",
    "data_path": "data.train.0.path",
    "train_file": "data.train.0.path",
    "train_data": "data.train",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "eval_data": "data.eval",
    "val_set_size": "data.eval_fraction",
    "image_folder": "data.train.0.image_root",
    "image_dir": "data.train.0.image_root",
    "max_seq_length": "data.max_text_tokens",
    "max_length": "data.max_text_tokens",
    "cutoff_len": "data.max_text_tokens",
    "sequence_len": "data.max_text_tokens",
    "model_max_length": "data.max_text_tokens",
    "chat_template": "data.template",
    "system": "data.system_prompt",
    "sample_packing": "data.packing",
    "cache_dir": "data.cache.folder",
}
