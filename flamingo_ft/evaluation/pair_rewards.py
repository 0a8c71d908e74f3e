"""How often the chosen answer of a held-out pair has the larger reward than the rejected one (DPO, KTO).

The reward of an answer is ``beta`` times how much more probable it is (log-probability, in nats) than before
training; before training all rewards are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RANKED_KEY, MARGIN_KEY = "eval_rewards/accuracies", "eval_rewards/margins"  # in the log; TRL's names


@dataclass(frozen=True)
class PairRewards:
    """The rewards of held-out pairs after training.

    samples: number of pairs. ranked_correctly: share of those whose chosen answer has the larger reward.
    reward_margin: mean of the chosen answer's reward minus the rejected one's.
    """

    samples: int
    ranked_correctly: float
    reward_margin: float

    @classmethod
    def of_margins(cls, margins: Sequence[float]) -> PairRewards:
        """Summarize the reward margins of pairs."""
        ranked = sum(margin > 0 for margin in margins)
        return cls(len(margins), ranked / len(margins), math.fsum(margins) / len(margins))

    def log_values(self) -> dict[str, float]:
        """Return the keys and values of a log entry, as evaluations during training have them."""
        return {RANKED_KEY: self.ranked_correctly, MARGIN_KEY: self.reward_margin}
