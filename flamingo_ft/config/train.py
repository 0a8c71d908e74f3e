"""The ``train`` and ``eval`` sections of a recipe: optimization, checkpoints, logging and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from flamingo_ft.config.section import LAX, Count, FilePath, Section, one_of, with_keys
from flamingo_ft.config.tables import BRIDGE_PARTS, METRICS

if TYPE_CHECKING:
    from flamingo_ft.config.schema import Recipe

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


_RATE_DOC = "Peak learning rate of the {}. null: train.learning_rate."
_DECAY_DOC = "Weight decay of the matrices of the {}. null: train.weight_decay."


@with_keys(
    {part.name: (Rate | None, Field(None, description=_RATE_DOC.format(part.label))) for part in BRIDGE_PARTS}
)
class RatesSection(Section):
    """Peak learning rates per part. null: train.learning_rate."""

    lora: Rate | None = None
    """Peak learning rate of all LoRA weights. null: train.learning_rate."""


@with_keys(
    {
        part.name: (Decay | None, Field(None, description=_DECAY_DOC.format(part.label)))
        for part in BRIDGE_PARTS
        if part.decays
    }
)
class DecaysSection(Section):
    """Weight decay per part. null: train.weight_decay. Gates, norms, latents and token rows are never decayed."""

    lora: Decay | None = None
    """Weight decay of all LoRA matrices. null: train.weight_decay."""


class DpoSection(Section):
    """Settings of direct preference optimization (DPO, arXiv:2305.18290), used when train.method is dpo."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the penalty for moving away from the reference model, which is the model before training. Larger
    values keep the model closer to it."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss function: DPO's original (sigmoid), the hinge loss of SLiC (arXiv:2305.10425), or IPO
    (arXiv:2310.12036)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed fraction of pairs whose preference is labelled the wrong way round (robust DPO, arXiv:2403.00409). Only
    with the sigmoid loss."""


class TrainSection(Section):
    """Training: method, length, optimization, checkpoints and logging. Set either max_steps or epochs."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["max_steps"]}, {"required": ["epochs"]}]}
    )

    output_dir: FilePath
    """Folder for everything the run writes, relative to the current directory. Must be new or empty, unless the run is
    resumed."""
    method: Literal["sft", "dpo"] = "sft"
    """sft: supervised fine-tuning on the answers. dpo: learn from pairs of a better and a worse answer."""
    dpo: DpoSection = DpoSection()
    """Settings of DPO."""
    max_steps: Count | None = None
    """Length of the run in optimizer steps. Set either this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training data, fractions allowed; converted to steps when the data is
    opened, rounded up. One epoch draws each row once, and a row of a source with weight w w times on average. Rows
    that are skipped or dropped while training count as drawn; with data.packing, the number of packed rows is
    estimated from the first 1,000 samples. Not available for streamed sources. Set either this or max_steps."""
    batch_size: Count = 8
    """Samples per device and forward pass; with dpo, pairs of answers; with data.packing, packed rows. Lower it if
    memory runs out, and raise gradient_accumulation_steps to compensate."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step. The loss is averaged over the label tokens of all of them, so the result is
    that of one large batch."""
    learning_rate: Rate = 1e-4
    """Peak learning rate of AdamW, for every part that learning_rates does not list."""
    learning_rates: RatesSection = RatesSection()
    """Separate peak learning rates per part."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay of AdamW, for matrices; gates, norms, biases, latents and token rows are never
    decayed."""
    weight_decays: DecaysSection = DecaysSection()
    """Separate weight decay per part."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises linearly from zero to its peak. Set either this or
    warmup_ratio."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warmup as a fraction of all optimizer steps, rounded up. Set either this or warmup_steps; useful with epochs,
    where the number of steps follows from the data."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after the warmup: constant, or decaying to zero at the last step (linear, cosine)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping: gradients with a larger norm are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep activations in host RAM between the forward and the backward pass. Needs a GPU."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW with 32-bit or 8-bit optimizer state. The paged variants move the state to host RAM when GPU memory is
    full."""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as its gradient is computed, so that all gradients are never in memory together.
    Needs a single process, no gradient accumulation and no fp16 loss scaling; gradients are clipped per parameter."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype of the computation (autocast). auto: bf16 if the GPU supports it, fp16 with loss scaling on older GPUs,
    fp32 on a CPU. The trainable weights themselves are stored in trainable.dtype."""
    fsdp: bool = False
    """Shard all weights across the processes (FSDP2) instead of replicating the model in each. Needs several
    processes."""
    non_finite: Literal["stop", "skip_step"] = "stop"
    """What to do on a NaN or infinite loss or gradient: stop the run and report the samples and module it came from
    (stop), or skip the optimizer step and continue (skip_step)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed for weight initialization, sample order, augmentation and the choice of held-out rows."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Worker processes that prepare samples in parallel. 0: the training process prepares them itself. The batches are
    the same with any number."""
    logging_steps: Count = 10
    """Log every N optimizer steps."""
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], LAX] = ("tensorboard",)
    """Experiment trackers to log to, in addition to log.jsonl and report.html."""
    save_steps: Count | None = 500
    """Save a checkpoint, which `train --resume` can continue from, every N optimizer steps. The last step and an
    interrupted run always save one. null: only those."""
    save_total_limit: Count = 2
    """Number of checkpoints to keep; older ones are deleted."""
    checkpoint_dir: FilePath | None = None
    """Folder for checkpoints, for example on a mounted drive that outlives the machine. Relative to the current
    directory. null: output_dir/checkpoints."""
    push_to_hub: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")] | None = None
    """Hugging Face Hub repository, as org/name, to upload each checkpoint and the final adapter to. Created as a
    private repository if it does not exist. null: upload nothing."""


class EvalSection(Section):
    """Evaluation on the held-out samples, before, during and after training."""

    batch_size: Count = 8
    """Questions answered in parallel. Larger is faster and takes more memory."""
    max_new_tokens: Count = 32
    """Maximum length of a generated answer in tokens, including its end token. `flamingo-ft check` warns if reference
    answers are longer."""
    max_samples: Count | None = None
    """Evaluate only the first N held-out samples of each source. null: all."""
    before: bool = True
    """Also evaluate before training, as a baseline."""
    shuffled_images: bool = True
    """Also evaluate with the images swapped between samples. Accuracy that does not drop means that the model ignores
    the images."""
    steps: Count | None = None
    """Evaluate every N optimizer steps during training. null: only before and after training."""
    answers: bool = True
    """Whether evaluations during training also generate answers and measure accuracy, which takes longer than the
    loss alone."""
    metric: Annotated[str, one_of(METRICS), Field(json_schema_extra={"enum": [*METRICS]})] = "loss"
    """Metric that decides which evaluation is the best, for keep and patience."""
    keep: Literal["last", "best"] = "last"
    """Which adapter the run ends with: that of the last step (last), or of the best evaluation (best). best needs
    eval.steps."""
    patience: Count | None = None
    """Early stopping: end training after N evaluations in a row without improvement. Needs eval.steps. null: never."""


def contradictions_of_training(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Location and message of each cross-field validation error of ``train`` and ``eval``."""
    train, judged = recipe.train, recipe.eval
    yield from _contradictions_of_length(recipe)
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
        yield (
            ("trainable", "dtype"),
            "fp16 training wants weights in fp32 beside it; use fp32, or train.precision bf16",
        )
    for key, set_to in (("keep", judged.keep == "best"), ("patience", judged.patience is not None)):
        if set_to and judged.steps is None:
            yield ("eval", key), "wants evaluations during training; set eval.steps"
    if judged.steps and not (recipe.data.eval or recipe.data.eval_fraction):
        yield (
            ("eval", "steps"),
            "there is nothing to evaluate on; name data.eval or data.eval_fraction, or set it to null",
        )
    if judged.metric != "loss" and not judged.answers and judged.steps:
        reason = f"{judged.metric} needs generated answers; set eval.answers to true, or use loss"
        yield ("eval", "metric"), reason
    yield from _settings_of_what_stays_frozen(recipe)
    yield from _contradictions_of_dpo(recipe)
    yield from _contradictions_of_fsdp(recipe)
    if train.dpo != DpoSection() and train.method != "dpo":
        yield (
            ("train", "dpo"),
            f"found train.method {train.method}, which has no use for it; use dpo, or remove it",
        )


def _contradictions_of_length(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The length of a run, and of its warmup, is given in one of two units."""
    train = recipe.train
    if train.max_steps is None and train.epochs is None:
        yield ("train", "max_steps"), "missing; add it, or train.epochs in its place"
    if train.max_steps is not None and train.epochs is not None:
        yield (
            ("train", "epochs"),
            f"got {train.epochs:g} beside max_steps {train.max_steps}; remove one of them",
        )
    if train.epochs is not None and any(source.streaming for source in recipe.data.train):
        reason = "a streamed source has no known length; use train.max_steps, or set streaming to false"
        yield ("train", "epochs"), reason
    if train.warmup_ratio is not None and train.warmup_steps:
        reason = f"got {train.warmup_ratio:g} beside warmup_steps {train.warmup_steps}; remove one of them"
        yield ("train", "warmup_ratio"), reason


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
        yield (
            ("train", "fsdp"),
            "dpo's reference shares the weights that would be sharded; use sft, or set it to false",
        )
    if train.optimizer != "adamw" or train.optimizer_in_backward:
        yield (
            ("train", "optimizer"),
            "sharded weights take adamw alone, after the backward pass; use it, or no train.fsdp",
        )
    if recipe.data.cache:
        yield (
            ("data", "cache"),
            "its tower runs outside the sharded model; set it to null, or train.fsdp to false",
        )
    if (
        "int8" in (model.vision.quantization, model.language.quantization)
        or model.bridge_quantization != "none"
    ):
        yield (
            ("train", "fsdp"),
            "8-bit matrices and a quantized bridge cannot be sharded; use nf4 or none, or set it to false",
        )


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
