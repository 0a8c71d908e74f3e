"""The ``train`` and ``eval`` sections of a recipe: how training goes, what it leaves behind, how it is judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from flamingo_ft.config.section import LAX, Count, FilePath, Section

if TYPE_CHECKING:
    from flamingo_ft.config.schema import Recipe

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


class RatesSection(Section):
    """Peak learning rates of single parts; null: train.learning_rate."""

    perceiver: Rate | None = None
    """Of the perceiver resampler."""
    cross_attention: Rate | None = None
    """Of the gated cross-attention blocks."""
    new_tokens: Rate | None = None
    """Of the embedding rows of new tokens."""
    lora: Rate | None = None
    """Of LoRA, wherever it is."""


class DecaysSection(Section):
    """Weight decay of single parts; null: train.weight_decay. Gates, norms, latents and token rows never decay."""

    perceiver: Decay | None = None
    """Of the perceiver resampler's matrices."""
    cross_attention: Decay | None = None
    """Of the gated cross-attention blocks' matrices."""
    lora: Decay | None = None
    """Of LoRA's matrices, wherever they are."""


class DpoSection(Section):
    """Direct preference optimisation (arXiv:2305.18290), where train.method is dpo."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference: the model before training."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """DPO's own loss, a hinge (SLiC, arXiv:2305.10425) or IPO's (arXiv:2310.12036)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (robust DPO, arXiv:2403.00409); with the
    sigmoid loss."""


class TrainSection(Section):
    """How training goes."""

    output_dir: FilePath
    """Folder that the run is written to, relative to the current directory. Must be new or empty."""
    method: Literal["sft", "dpo"] = "sft"
    """sft: learn the answers of samples. dpo: prefer the better of two answers."""
    dpo: DpoSection = DpoSection()
    """Settings of dpo."""
    max_steps: Count
    """Optimizer steps."""
    batch_size: Count = 8
    """Samples, or pairs of answers, per device and forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step. The loss is a mean over the label tokens of all of them."""
    learning_rate: Rate = 1e-4
    """Peak learning rate of AdamW."""
    learning_rates: RatesSection = RatesSection()
    """Peak learning rates of single parts."""
    weight_decay: Decay = 0.1
    """AdamW's decoupled weight decay."""
    weight_decays: DecaysSection = DecaysSection()
    """Weight decay of single parts."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from zero."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up, in optimizer steps."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep activations in the computer's memory between forward and backward. On a GPU only."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW with its state in 32 or 8 bits; paged: moved to the computer's memory where the GPU's is full."""
    optimizer_in_backward: bool = False
    """Step each parameter as soon as its gradient is there, so that gradients are never held together. One process, no
    accumulation, no loss scaling; gradients are clipped one by one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the computation. auto: bf16 where the GPU has it, fp16 with a scaled loss on an older one, fp32
    without a GPU. Weights that train are kept as trainable.dtype says, in fp32 beside fp16."""
    fsdp: bool = False
    """Shard every weight over the processes (FSDP2), instead of the whole model in each of them."""
    non_finite: Literal["stop", "skip_step"] = "stop"
    """What a loss or gradient that is no number does: end the run, naming samples and module, or cost that step only."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of samples."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes that prepare batches beside the training process. 0: none."""
    logging_steps: Count = 10
    """Steps between two entries of the log."""
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], LAX] = ("tensorboard",)
    """Where the log goes beside log.jsonl and the report."""
    save_steps: Count | None = 500
    """Steps between checkpoints, from which --resume goes on. null: only where a run is told to stop."""
    save_total_limit: Count = 2
    """Checkpoints that are kept; the oldest are removed."""
    checkpoint_dir: FilePath | None = None
    """Folder for checkpoints, such as a mounted drive that outlives the machine, relative to the current directory. null:
    output_dir/checkpoints."""
    push_to_hub: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")] | None = None
    """A repository on the Hugging Face Hub, org/name, that checkpoints and the adapter are pushed to as they come; made
    private where it is not there. null: nothing is pushed."""


class EvalSection(Section):
    """How the held-out samples are judged."""

    batch_size: Count = 8
    """Samples answered at once."""
    max_new_tokens: Count = 32
    """Longest answer in tokens."""
    max_samples: Count | None = None
    """Only the first samples of each source. null: all."""
    before: bool = True
    """Also answer before training, for comparison."""
    shuffled_images: bool = True
    """Also answer with another sample's images, to show what is really read from them."""
    steps: Count | None = None
    """Steps between evaluations during training: the loss, and accuracy. null: none."""
    answers: bool = True
    """Whether evaluations during training also answer, which costs more than the loss."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What tells the best evaluation."""
    keep: Literal["last", "best"] = "last"
    """The adapter that a run ends with: that of its last step, or of its best evaluation."""
    patience: Count | None = None
    """Evaluations in a row without a better one, after which training ends. null: it never ends early."""


def contradictions_of_training(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Location and message of what no single value of ``train`` and ``eval`` is to blame for."""
    train, judged = recipe.train, recipe.eval
    if train.optimizer_in_backward and train.gradient_accumulation_steps > 1:
        reason = (
            f"found gradient_accumulation_steps {train.gradient_accumulation_steps}; "
            "a step inside the backward pass sees one batch: use 1 and a larger batch_size, or set it to false"
        )
        yield ("train", "optimizer_in_backward"), reason
    if train.optimizer_in_backward and train.non_finite == "skip_step":
        reason = "a step inside the backward pass cannot be left out afterwards; use stop, or no optimizer_in_backward"
        yield ("train", "non_finite"), reason
    if train.precision == "fp16" and recipe.trainable.dtype == "bf16":
        yield ("trainable", "dtype"), "fp16 training wants weights in fp32 beside it; use fp32, or train.precision bf16"
    for key, set_to in (("keep", judged.keep == "best"), ("patience", judged.patience is not None)):
        if set_to and judged.steps is None:
            yield ("eval", key), "wants evaluations during training; set eval.steps"
    if judged.steps and not (recipe.data.eval or recipe.data.eval_fraction):
        yield ("eval", "steps"), "there is nothing to evaluate on; name data.eval or data.eval_fraction, or set it to null"
    if judged.metric == "accuracy" and not judged.answers and judged.steps:
        yield ("eval", "metric"), "accuracy comes from answers; set eval.answers to true, or use loss"
    yield from _settings_of_what_stays_frozen(recipe)
    yield from _contradictions_of_dpo(recipe)
    yield from _contradictions_of_fsdp(recipe)
    if train.dpo != DpoSection() and train.method != "dpo":
        yield ("train", "dpo"), f"found train.method {train.method}, which has no use for it; use dpo, or remove it"


def _settings_of_what_stays_frozen(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Rates and decays of parts that do not train would be without effect."""
    trains = recipe.trainable.model_dump(exclude={"dtype"}) | {"lora": bool(recipe.lora.parts)}
    for section in ("learning_rates", "weight_decays"):
        for part in getattr(recipe.train, section).model_dump(exclude_none=True):
            if not trains[part]:
                yield ("train", section, part), _frozen(part, part in recipe.lora.parts)


def _frozen(part: str, has_lora: bool) -> str:
    if part == "lora":
        return "no part has LoRA; give one LoRA, or remove this value"
    remedy = "its LoRA goes by the value named lora" if has_lora else "remove this value, or let it train"
    return f"found trainable.{part} false; {remedy}"


def _contradictions_of_fsdp(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    train, model = recipe.train, recipe.model
    if not train.fsdp:
        return
    if train.method == "dpo":
        yield ("train", "fsdp"), "dpo's reference shares the weights that would be sharded; use sft, or set it to false"
    if train.optimizer != "adamw" or train.optimizer_in_backward:
        yield ("train", "optimizer"), "sharded weights take adamw alone, after the backward pass; use it, or no train.fsdp"
    if recipe.data.cache:
        yield ("data", "cache"), "its tower runs outside the sharded model; set it to null, or train.fsdp to false"
    if "int8" in (model.vision.quantization, model.language.quantization) or model.bridge_quantization != "none":
        yield ("train", "fsdp"), "8-bit matrices and a quantized bridge cannot be sharded; use nf4 or none, or set it to false"


def _contradictions_of_dpo(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if recipe.train.method != "dpo":
        return
    wanted = recipe.train.dpo
    if wanted.label_smoothing and wanted.loss_type != "sigmoid":
        reason = f"found loss_type {wanted.loss_type}, which has none; use sigmoid, or set it to 0"
        yield ("train", "dpo", "label_smoothing"), reason
    if recipe.data.packing:
        reason = "pairs are compared row by row, so dpo lays no samples together; set it to false (group_by_length saves too)"
        yield ("data", "packing"), reason
    if recipe.lora.lora_dropout:
        reason = f"found {recipe.lora.lora_dropout:g}; dpo compares two models, and drops units of neither; set it to 0"
        yield ("lora", "lora_dropout"), reason
