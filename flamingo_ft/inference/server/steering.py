"""Penalties and biases of OpenAI's API, on the scores of the next token.

Shapes: B answers, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .requests import Sampling


class Steering(LogitsProcessor):
    """scores (B, V) - frequency_penalty * times said - presence_penalty * (said at all) + logit_bias.

    Only the answer counts as said, its prompt of ``prompt_tokens`` tokens does not.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int):
        self._sampling, self._prompt_tokens = sampling, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = input_ids[:, self._prompt_tokens :]
        times = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        scores = (
            scores - self._sampling.frequency_penalty * times - self._sampling.presence_penalty * (times > 0)
        )
        for token, bias in self._sampling.logit_bias.items():
            scores[:, token] += bias
        return scores


def steer(sampling: Sampling, prompt_tokens: int) -> LogitsProcessorList:
    """What the request asks for; empty where it asks for nothing."""
    asked = sampling.frequency_penalty or sampling.presence_penalty or sampling.logit_bias
    return LogitsProcessorList([Steering(sampling, prompt_tokens)] if asked else [])
