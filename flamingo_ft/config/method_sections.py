"""Sections ``train.dpo``, ``train.kto`` and ``train.grpo`` of a recipe: what each training method adds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema

from flamingo_ft.config.metric_names import AnswerMetricName, metric_schema
from flamingo_ft.config.section import LAX, Count, Section
from flamingo_ft.config.tables import REWARDS

DpoLoss = Literal["sigmoid", "hinge", "ipo", "bco_pair", "apo_zero", "apo_down", "sft"]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Weights = Annotated[tuple[Weight, ...], LAX, Field(min_length=1)]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _one_or_more(schema: dict[str, object]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]})


DpoLosses = Annotated[  # a list, or one name
    tuple[DpoLoss, ...],
    LAX,
    Field(min_length=1),
    BeforeValidator(_listed),
    _one_or_more({"type": "string", "enum": [*get_args(DpoLoss)]}),
]
Rewards = Annotated[  # a list, or one name
    tuple[AnswerMetricName, ...],
    LAX,
    Field(min_length=1),
    BeforeValidator(_listed),
    _one_or_more(metric_schema(REWARDS)),
]


class DpoSection(Section):
    """Settings of direct preference optimization (DPO, arXiv:2305.18290).

    They apply if train.method is dpo.
    """

    beta: Positive = 0.1
    """Strength of the penalty for moving away from the reference model, which is the model before training.
    Larger values keep the model closer to it."""
    loss_type: DpoLosses = ("sigmoid",)
    """Loss function: sigmoid (the original DPO), hinge (SLiC, arXiv:2305.10425), ipo (IPO, arXiv:2310.12036),
    bco_pair (BCO, arXiv:2404.04656: is each answer good or bad by itself?), apo_zero or apo_down (APO,
    arXiv:2408.06266), sft (cross-entropy of the chosen answer). A list adds up several: [sigmoid, bco_pair,
    sft] with loss_weights [0.8, 0.2, 1.0] is mixed preference optimization (MPO, arXiv:2411.10442), which
    keeps long answers fluent where DPO alone lowers the probability of both answers."""
    loss_weights: Weights | None = None
    """Weight of each entry of loss_type. null: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed fraction of pairs whose preference is labelled the wrong way round (robust DPO,
    arXiv:2403.00409). Raise it for noisy preferences. Only with the sigmoid loss."""


class KtoSection(Section):
    """Settings of Kahneman-Tversky optimization (KTO, arXiv:2402.01306).

    They apply if train.method is kto.
    """

    beta: Positive = 0.1
    """Strength of the penalty for moving away from the reference model, which is the model before training.
    Larger values keep the model closer to it."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss function: kto, which compares each answer with how far the model has moved on average, or
    apo_zero_unpaired (APO, arXiv:2408.06266), which compares it with zero, for data whose good answers are
    better than the model's own."""
    desirable_weight: Positive = 1.0
    """Weight of good answers in the loss. With many more bad than good ones, raise it so that this weight
    times their number is 1 to 1.33 times that of bad ones (section 4.2 of the paper)."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers in the loss. Raise it likewise if good answers are in the majority."""


class GrpoSection(Section):
    """Settings of group relative policy optimization (GRPO, arXiv:2402.03300).

    They apply if train.method is grpo. For each question, several answers are sampled and scored; those
    better than the mean of their group become more probable, the others less.
    """

    reward: Rewards = ("accuracy",)
    """Score of a sampled answer, compared with the reference answers of its row: a metric that scores each
    answer by itself, or a function of your own as FILE.py:function, called like those of eval.metrics. A list
    adds up several. Larger is better. accuracy suits short answers; for sentences, of which none will equal
    the reference, use rouge_l."""
    reward_weights: Weights | None = None
    """Weight of each entry of reward. null: 1 each."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers sampled per question. More of them make the mean of a group more exact and find rare good
    answers; time and memory grow with them. train.batch_size has to be a multiple."""
    temperature: Positive = 1.0
    """Sampling temperature. If all answers of most groups are alike (frac_reward_zero_std in the log is near
    1), nothing is learned; raise it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens with this total probability. 1: from all."""
    max_completion_tokens: Count = 64
    """Maximum length of a sampled answer in tokens, including its end token. Longer ones are cut, and scored
    as they are."""
    mask_truncated_completions: bool = False
    """Leave cut answers out of the loss. Set it if good answers are often cut."""
    beta: Weight = 0.0
    """Weight of the KL divergence from the reference model, which is the model before training. 0: no
    reference model, which saves its memory and time. Raise it (0.001 to 0.04) if answers degenerate."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """How token losses are averaged: over all tokens of a batch (dapo, arXiv:2503.14476), per answer and then
    over answers, which favours short good answers (grpo, the paper's), or divided by
    max_completion_tokens (dr_grpo, arXiv:2503.20783)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide rewards by their standard deviation within the group or the batch, or not at all (none), which
    gives very easy and very hard questions no extra weight."""
