"""Group relative policy optimization (GRPO, arXiv:2402.03300): TRL's trainer, and metrics as its rewards.

Answers are sampled anew for every forward pass and used once, so a checkpoint needs none of them: the random
states that it holds are enough to sample what an uninterrupted run samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from trl import GRPOConfig, GRPOTrainer

from flamingo_ft.adapters.answering import end_token_ids
from flamingo_ft.adapters.trainable import frozen_copy, match_training_mode, zero_dropout
from flamingo_ft.config import GrpoSection
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import METRICS, Metric
from flamingo_ft.evaluation.metrics.user_metric import user_metric
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .compat import add_fused_lm_head
from .trainer import FlamingoTrainerMixin, checkpointing_name_warning_ignored

RewardFunction = Callable[..., list[float | None]]


class FlamingoGrpoTrainer(FlamingoTrainerMixin, GRPOTrainer):  # pyrefly: ignore[inconsistent-inheritance]
    """GRPO with the initial model as reference, if ``beta`` is not 0. Dropout is off.

    Its held-out loss is the cross-entropy of the reference answers: nothing is sampled in an evaluation.
    """

    def __init__(
        self,
        *positional: Any,
        model: FlamingoForConditionalGeneration,
        args: GRPOConfig,
        processing_class: FlamingoProcessor,
        **arguments: Any,
    ):
        zero_dropout(model)
        reference = frozen_copy(model) if args.beta else None
        # Sampled answers end where generated ones do.
        model.generation_config.eos_token_id = end_token_ids(model, processing_class)
        self._forward_at_temperature_1 = _fused_forward(model)
        self._sampled: dict[int, Any] = {}
        beta, args.beta = args.beta, 0.0  # with any other, TRL loads a reference model by name
        super().__init__(*positional, model=model, args=args, processing_class=processing_class, **arguments)
        args.beta = self.beta = beta
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        self._sampled.clear()
        return super().get_batch_samples(*arguments, **options)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Sample and score answers to the questions of a training batch; keep them until the step ends."""
        if isinstance(inputs, Mapping):
            return super(GRPOTrainer, self)._prepare_inputs(dict(inputs))
        if self.ref_model is not None:
            match_training_mode(cast(torch.nn.Module, self.ref_model), self.model.training)
        try:
            with checkpointing_name_warning_ignored():
                self._sampled[id(inputs)] = super()._prepare_inputs(inputs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch.multinomial's words for NaN and Inf
                raise
            raise UserError(
                f"training: probabilities of answers are not finite at step {self.state.global_step + 1}; "
                f"sampled for {inputs[0]['where']} and others; lower train.learning_rate"
            ) from None
        return self._sampled[id(inputs)]

    def prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Return a held-out batch on the trainer's device, or what was sampled for a training batch."""
        if isinstance(inputs, Mapping):
            return super().prepare_inputs(inputs)
        return self._sampled[id(inputs)]

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Return the policy loss of sampled answers, or the cross-entropy of a batch with labels."""
        if "labels" in inputs:
            return self.score_labels(inputs).loss
        return super().compute_loss(model, inputs, *arguments, **options)

    def score_labels(self, inputs: Mapping[str, Any]) -> Any:
        """Return TRL's fused output on a batch, with ``log_probs`` (B, T - 1), zero where there is no label.

        At temperature 1, while sampled answers are scored at the temperature that they are sampled at.
        """
        sampling_forward = self.model.forward
        self.model.forward = self._forward_at_temperature_1
        try:
            return self.model(**inputs, use_cache=False, fused_lm_head=True)
        finally:
            self.model.forward = sampling_forward


def _fused_forward(model: FlamingoForConditionalGeneration) -> Callable[..., Any]:
    """Return the forward pass with TRL's output head, and leave the model as it is."""
    add_fused_lm_head(model)
    return model.__dict__.pop("forward")


def grpo_arguments(grpo: GrpoSection) -> dict[str, Any]:
    """Return TRL's arguments for the settings of a recipe."""
    passed_through = ("num_generations", "temperature", "top_p", "beta", "loss_type", "scale_rewards")
    return {
        **{name: getattr(grpo, name) for name in (*passed_through, "mask_truncated_completions")},
        "max_completion_length": grpo.max_completion_tokens,
        "reward_weights": None if grpo.reward_weights is None else [*grpo.reward_weights],
        # One generation per forward pass, used once: with answers that outlive a step, a resumed run would
        # have to sample them again.
        "steps_per_generation": 1,
        "num_iterations": 1,
        "disable_dropout": True,
        "num_generations_eval": 1,  # evaluations sample nothing, so their batches can have any size
    }


# --- rewards ---


def reward_functions(grpo: GrpoSection) -> list[RewardFunction]:
    """Return TRL's reward function of each metric in ``train.grpo.reward``.

    Each is tried once, so that one that cannot be computed is refused before training. Raises UserError for
    a function in a user's file that is not there or fails.
    """
    # Not `find_metrics`: in a log of rewards, a user's function may be called reward.
    metrics = [METRICS[name] if name in METRICS else user_metric(name) for name in grpo.reward]
    for metric in metrics:
        score_answers(metric, ["yes"], [["yes"]])
    return [_reward_function(metric) for metric in metrics]


def score_answers(
    metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float | None]:
    """Return the value of ``metric`` for each answer by itself; None where it is not defined."""
    statistics = metric.statistics(answers, references)
    sign = 1.0 if metric.higher_is_better else -1.0
    values = (metric.value(statistics[index : index + 1]) for index in range(len(answers)))
    return [None if value is None else sign * value for value in values]


def _reward_function(metric: Metric) -> RewardFunction:
    def reward(
        completions: Sequence[Any], references: Sequence[Sequence[str]], **_: Any
    ) -> list[float | None]:
        answers = [message["content"] for (message,) in completions]
        return score_answers(metric, answers, references)

    reward.__name__ = metric.name  # in TRL's log: rewards/<name>/mean
    return reward
