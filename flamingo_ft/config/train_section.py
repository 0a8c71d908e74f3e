"""Sections ``train`` and ``eval`` of a recipe: optimization, checkpoints, logging and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from flamingo_ft.config.method_sections import DpoSection, GrpoSection, KtoSection
from flamingo_ft.config.metric_names import AnswerMetricName, MetricName
from flamingo_ft.config.section import LAX, Count, OutputPath, Section, with_keys
from flamingo_ft.config.tables import BRIDGE_PARTS, CROSS_ATTENTION, Part

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


def _rate_documentation(part: Part) -> str:
    gates = " without their attention gates" if part is CROSS_ATTENTION else ""
    return f"Peak learning rate of the {part.label}{gates}. null: train.learning_rate."


def _decay_documentation(part: Part) -> str:
    return f"Weight decay of the matrices of the {part.label}. null: train.weight_decay."


@with_keys(
    {part.name: (Rate | None, Field(None, description=_rate_documentation(part))) for part in BRIDGE_PARTS}
)
class RatesSection(Section):
    """Peak learning rates per part. null: train.learning_rate."""

    gates: Rate | None = None
    """Peak learning rate of the attention gates. null: ten times that of the cross-attention blocks for a new
    bridge, the same as theirs with model.init_from. A gate is a single number, which moves by about its
    learning rate per step, and as long as it is near zero the language model sees nothing. Feed-forward gates
    learn at the rate of the blocks: they change text without images too."""
    lora: Rate | None = None
    """Peak learning rate of all LoRA weights. null: train.learning_rate."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of LoRA's B matrices, which start at zero, and of DoRA's
    magnitudes, as a multiple of that of the A matrices, which keep theirs. The authors recommend 16 with half
    the usual rate in lora. Try it if LoRA learns slowly. null: the same for both."""


@with_keys(
    {
        part.name: (Decay | None, Field(None, description=_decay_documentation(part)))
        for part in BRIDGE_PARTS
        if part.decays
    }
)
class DecaysSection(Section):
    """Weight decay per part. null: train.weight_decay.

    Gates, norms, biases, latents and token rows are never decayed.
    """

    lora: Decay | None = None
    """Weight decay of all LoRA matrices. null: train.weight_decay."""


class TrainSection(Section):
    """Training: method, length, optimization, checkpoints and logging. Set either max_steps or epochs."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["max_steps"]}, {"required": ["epochs"]}]}
    )

    output_dir: OutputPath
    """Folder for everything the run writes, relative to the current directory. It has to be new or empty,
    unless the run is resumed."""
    method: Literal["sft", "dpo", "kto", "grpo"] = "sft"
    """sft: supervised fine-tuning on the answers. dpo: direct preference optimization on pairs of a chosen
    and a rejected answer. kto: Kahneman-Tversky optimization on answers labelled good or bad, or on pairs.
    grpo: group relative policy optimization, on the model's own answers, scored by a metric. All but sft need
    a model that answers already (model.init_from)."""
    dpo: DpoSection = DpoSection()
    """Settings of DPO."""
    kto: KtoSection = KtoSection()
    """Settings of KTO."""
    grpo: GrpoSection = GrpoSection()
    """Settings of GRPO."""
    max_steps: Count | None = None
    """Length of the run in optimizer steps. Set either this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training data, fractions allowed. Converted to optimizer steps
    when the data is opened, rounded up. An epoch draws each row `weight` times on average. Rows that are
    skipped or dropped count as drawn; with data.packing, the number of packed rows is estimated from the
    first 1,000 samples. Not available for streamed sources. Set either this or max_steps."""
    batch_size: Count = 8
    """Samples per device and forward pass (with dpo, pairs of answers; with grpo, sampled answers, of which
    num_generations belong to a question; with data.packing, packed rows). If memory runs out, lower it and
    raise gradient_accumulation_steps by the same factor."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step. The loss is averaged over the label tokens of all of them, so the
    result equals that of one large batch. (Except with kto, which compares answers within a forward pass,
    the sft loss of dpo, and grpo.)"""
    learning_rate: Rate | None = None
    """Peak learning rate, for every part without its own in learning_rates. null: 1e-3 for a new
    bridge, 1e-4 for LoRA and for a bridge from model.init_from. Lower it if the loss is unstable."""
    learning_rates: RatesSection = RatesSection()
    """Peak learning rates per part."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay. Applies to matrices; gates, norms, biases, latents and token rows are
    never decayed."""
    weight_decays: DecaysSection = DecaysSection()
    """Weight decay per part."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises linearly from zero to its peak. Raise it if the loss
    jumps at the beginning. Set either this or warmup_ratio."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warmup as a fraction of all optimizer steps, rounded up: useful with epochs, where the number of steps
    follows from the data. Set either this or warmup_steps."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning-rate schedule after the warmup: constant, or decay to zero at the last step (linear,
    cosine)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping: a gradient with a larger norm is scaled down to this norm."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """NEFTune (arXiv:2310.05914): add uniform noise to the text embeddings during training, up to
    alpha / sqrt(tokens per row * width) in either direction. 5 to 15 are usual. Raise it against overfitting
    when a small dataset has long answers. Images, evaluations and the saved adapter have no noise. Only with
    method sft. null: none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory for about a third more
    time."""
    activation_offload: bool = False
    """Keep activations in host RAM between the forward and the backward pass: less GPU memory, and time for
    the copies. Needs a GPU."""
    optimizer: Literal["muon", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "muon"
    """muon: Muon (Jordan et al., 2024) for the attention matrices of the bridge, and AdamW for everything
    else. A new bridge learns from fewer samples with it. The matrices' peak learning rate is four times the
    one given for their part; their updates are computed in bf16 or, unless train.precision is bf16, in
    float32. adamw: AdamW, the default with model.init_from and with train.fsdp. adamw_8bit: AdamW with 8-bit
    state, which saves three quarters of its memory. The paged variants move the state to host RAM when GPU
    memory is full."""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as its gradient is computed, so that gradients are never in memory all at
    once. Gradients are then clipped per parameter. Needs a single process, no gradient accumulation and no
    fp16 loss scaling."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype of the computation (autocast). auto: bf16 if the GPU supports it or the CPU has instructions for
    it (AMX, AVX-512 BF16); fp16 with loss scaling on older GPUs; fp32 on other CPUs. With bf16, unquantized
    frozen backbones are kept in it; trainable weights are stored in trainable.dtype."""
    fsdp: bool = False
    """Shard all weights across the processes (FSDP2) instead of keeping a copy of the model in each. For
    models that do not fit on one device; needs several processes."""
    non_finite: Literal["stop", "skip_step"] = "stop"
    """What to do on a NaN or infinite loss or gradient: stop the run and report the samples and the module it
    came from (stop), or skip the optimizer step and continue (skip_step)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of weight initialization, sample order, augmentation and the choice of held-out rows."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Worker processes that prepare samples in parallel. 0: the training process prepares them itself.
    Batches are the same with any number. Raise it if the GPU waits for data."""
    logging_steps: Count = 10
    """Log every N optimizer steps."""
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], LAX] = ("tensorboard",)
    """Experiment trackers to log to, beside log.jsonl and report.html, which are always written."""
    save_steps: Count | None = 500
    """Save a checkpoint for `train --resume` every N optimizer steps. A checkpoint is also
    saved at the last step and when the run is interrupted. null: only then."""
    save_total_limit: Count = 2
    """Number of checkpoints to keep. Older ones are deleted."""
    checkpoint_dir: OutputPath | None = None
    """Folder for checkpoints, relative to the current directory; for example on a mounted drive that outlives
    the machine. null: output_dir/checkpoints."""
    push_to_hub: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")] | None = None
    """Hugging Face Hub repository, as org/name, that each checkpoint and the final adapter are uploaded to.
    Created as a private repository if it does not exist. null: nothing is uploaded."""

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy of the trained weights is kept, to compare the model with."""
        return self.method in ("dpo", "kto") or (self.method == "grpo" and self.grpo.beta > 0)

    @property
    def samples_per_batch(self) -> int:
        """How many samples of the data a forward pass takes on each device."""
        return self.batch_size // (self.grpo.num_generations if self.method == "grpo" else 1)


class EvalSection(Section):
    """Evaluation on the held-out samples before, during and after training."""

    batch_size: Count = 8
    """Questions answered in parallel. Larger values are faster and take more memory."""
    max_new_tokens: Count = 32
    """Maximum length of a generated answer in tokens, including its end token. `flamingo-ft check` warns if
    reference answers are longer."""
    max_samples: Count | None = None
    """Evaluate only the first N held-out samples of each source, to save time. null: all."""
    before: bool = True
    """Also evaluate before training, as a baseline."""
    shuffled_images: bool = True
    """Also evaluate with another image (that of another sample): metrics after training and, with sft, the
    rise in loss at every evaluation. If neither accuracy drops nor the loss rises, the model ignores the
    images."""
    steps: Count | None = None
    """Evaluate every N optimizer steps during training. null: only before and after it."""
    answers: bool = True
    """Whether evaluations during training also generate answers and compute their metrics, which takes longer
    than the loss alone."""
    metrics: Annotated[tuple[AnswerMetricName, ...], LAX, Field(min_length=1)] | None = None
    """Metrics of the generated answers: names, or functions of your own as FILE.py:function, each called with
    a prediction and the list of its reference answers, and returning a number. null: accuracy, and where the
    reference answers of a task are free text also rouge_l and cider_d."""
    metric: MetricName = "loss"
    """Metric by which evaluations are compared for keep and patience: loss, or a metric of answers, which is
    then computed even if it is not listed in metrics. Larger values of a function of your own are better."""
    keep: Literal["last", "best"] = "last"
    """Adapter that the run ends with: that of the last step (last) or of the best evaluation (best, which
    needs eval.steps)."""
    patience: Count | None = None
    """Early stopping: end training after N evaluations in a row without improvement. Needs eval.steps. null:
    never."""
