"""Cross-field validation of what each training method needs, and of what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flamingo_ft.config.data_section import DataSection
from flamingo_ft.config.method_sections import DpoSection, GrpoSection, KtoSection
from flamingo_ft.config.metric_names import USER_METRIC
from flamingo_ft.config.model_section import LoraSection
from flamingo_ft.config.tables import REWARDS, UNSUITABLE_REWARDS
from flamingo_ft.config.train_section import EvalSection, TrainSection
from flamingo_ft.config.yaml_document import Location

Errors = Iterator[tuple[Location, str]]  # the location of a key, and what is wrong with its value

DEFAULTS = {"dpo": DpoSection(), "kto": KtoSection(), "grpo": GrpoSection()}
WHY_UNPACKED = {
    "dpo": "dpo compares pairs row by row",
    "kto": "kto compares answers row by row",
    "grpo": "grpo samples answers row by row",
}
WHY_NO_DROPOUT = {
    "dpo": "dpo compares two models without dropout",
    "kto": "kto compares two models without dropout",
    "grpo": "grpo samples answers without dropout",
}


def check_method(
    train: TrainSection, data: DataSection, lora: LoraSection, evaluation: EvalSection
) -> Errors:
    """Check the settings of ``train.method``, and those of the other methods, which have no effect."""
    for name, default in DEFAULTS.items():
        if name != train.method and getattr(train, name) != default:
            yield (
                ("train", name),
                f"has no effect with train.method {train.method}; remove it, or use method {name}",
            )
    if train.method == "sft":
        return
    yield from _check_unsuitable(train, data, lora)
    if train.method == "dpo":
        yield from _check_dpo(train.dpo)
    elif train.method == "kto":
        yield from _check_kto(train, evaluation)
    else:
        yield from _check_grpo(train, data, lora)


def _check_unsuitable(train: TrainSection, data: DataSection, lora: LoraSection) -> Errors:
    """Check for settings that suit sft alone."""
    if data.packing:
        yield (
            ("data", "packing"),
            f"{WHY_UNPACKED[train.method]}, so samples cannot be packed; "
            "set packing to false (group_by_length also saves padding)",
        )
    if lora.lora_dropout:
        yield (
            ("lora", "lora_dropout"),
            f"got {lora.lora_dropout:g}, but {WHY_NO_DROPOUT[train.method]}; set lora_dropout to 0",
        )
    if train.neftune_noise_alpha is not None:
        yield (
            ("train", "neftune_noise_alpha"),
            f"{train.method} compares probabilities, which noise changes; use method sft, or set it to null",
        )


def _check_dpo(dpo: DpoSection) -> Errors:
    if dpo.label_smoothing and "sigmoid" not in dpo.loss_type:
        yield (
            ("train", "dpo", "label_smoothing"),
            f"only the sigmoid loss has label smoothing, got loss_type {', '.join(dpo.loss_type)}; "
            "use sigmoid, or set label_smoothing to 0",
        )
    yield from _check_weights(("train", "dpo", "loss_weights"), dpo.loss_weights, "loss_type", dpo.loss_type)


def _check_weights(
    location: Location, weights: Sequence[float] | None, key: str, names: Sequence[str]
) -> Errors:
    if weights is not None and len(weights) != len(names):
        yield (
            location,
            f"got {len(weights)} weights for the {len(names)} entries of {key}; use one for each, or null",
        )
    elif weights is not None and not any(weights):
        yield location, "got only zeros, which leave nothing to learn; raise one, or use null"


def _check_kto(train: TrainSection, evaluation: EvalSection) -> Errors:
    if train.kto.loss_type != "kto":
        return
    sizes = {("train", "batch_size"): train.batch_size}
    if evaluation.steps is not None:
        sizes["eval", "batch_size"] = evaluation.batch_size
    for location, size in sizes.items():
        if size < 2:
            yield (
                location,
                "got 1, but kto pairs each prompt with the answer of another row; use 2 or more, "
                "or train.kto.loss_type apo_zero_unpaired",
            )


def _check_grpo(train: TrainSection, data: DataSection, lora: LoraSection) -> Errors:
    grpo = train.grpo
    if train.batch_size % grpo.num_generations:
        yield (
            ("train", "grpo", "num_generations"),
            f"got {grpo.num_generations}, which does not divide train.batch_size {train.batch_size}, "
            "the number of sampled answers per forward pass; use a divisor, or change the batch size",
        )
    for name in grpo.reward:
        if name in UNSUITABLE_REWARDS:
            yield (
                ("train", "grpo", "reward"),
                f"{name} {UNSUITABLE_REWARDS[name]}; use {', '.join(REWARDS)} or {USER_METRIC}",
            )
    yield from _check_weights(("train", "grpo", "reward_weights"), grpo.reward_weights, "reward", grpo.reward)
    if train.activation_offload:
        yield (
            ("train", "activation_offload"),
            "grpo cannot offload activations; set it to false (gradient_checkpointing also saves memory)",
        )
    if data.cache:
        yield (
            ("data", "cache"),
            "grpo passes images to the model's own generation; set cache to null, or use method sft",
        )
    if data.tiles:
        yield (
            ("data", "tiles"),
            "grpo passes whole images to the model's own generation; set tiles to null, and start from a "
            "bridge without tiles, or use another method",
        )
    if lora.init_lora_weights == "eva":
        yield (
            ("lora", "init_lora_weights"),
            "eva is computed from training batches, which grpo samples from the model; "
            "use another initialization",
        )
