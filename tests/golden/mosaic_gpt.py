"""The measurements on a tiny MosaicGPT, the original or this package's, through the calls that both accept.

It has six heads because the ALiBi slopes differ from those of transformers' MPT unless the number of heads is
a power of two.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.golden.cases import Batch, continuation, left_padded, prompts
from tests.golden.measurements import gradients, real_positions
from tests.golden.tiny_models import EOC_TOKEN, LAYERS, MEDIA_TOKEN, VOCABULARY

FILE = Path(__file__).parent / "mosaic_gpt.safetensors"
SHAPE = {"d_model": 48, "n_heads": 6, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": VOCABULARY}
KIND = {
    "alibi": True,
    "attn_qk_ln": True,
    "no_bias": True,
    "low_precision_layernorm": True,
    "attn_impl": "torch",
}
NEW_TOKENS = 6


def measure(model: nn.Module) -> dict[str, Tensor]:
    """Return the logits of a left-padded batch and of a continuation token by token, and greedy tokens."""
    batch = left_padded()
    with torch.no_grad():
        logits = real_positions(_logits(model, batch), batch.attention_mask)
        return {"left_padded": logits, "continued": _continued(model), "greedy": _greedy(model)}


def loss_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the left-padded batch, and the gradient of every parameter."""
    batch = left_padded()
    logits = _logits(model, batch)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(batch)[:, 1:].flatten())
    parameters = dict(model.named_parameters())
    return loss.detach(), gradients(model, parameters, loss)


def labels(batch: Batch) -> Tensor:
    """Return the labels of the batch without those predicted at padding tokens."""
    after_padding = F.pad(batch.attention_mask, (1, -1), value=1) == 0
    return batch.labels.masked_fill(after_padding, -100)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.input_ids, attention_mask=batch.attention_mask.bool(), use_cache=False).logits


def _step(model: nn.Module, ids: Tensor, mask: Tensor, cache: object) -> tuple[Tensor, object]:
    """Return the logits (B, T, vocabulary) of tokens after those in the cache, and the updated cache."""
    output = model(ids, attention_mask=mask.bool(), past_key_values=cache, use_cache=True)
    return output.logits, output["cache" if "cache" in output else "past_key_values"]


def _continued(model: nn.Module) -> Tensor:
    """Return the logits (B, T, vocabulary) of tokens after left-padded prompts, computed one by one."""
    batch, steps = prompts(), []
    mask = batch.attention_mask
    _, cache = _step(model, batch.input_ids, mask, None)
    for token in continuation().unbind(1):
        mask = F.pad(mask, (0, 1), value=1)
        logits, cache = _step(model, token[:, None], mask, cache)
        steps.append(logits)
    return torch.cat(steps, dim=1)


def _greedy(model: nn.Module) -> Tensor:
    """Return greedy tokens (B, NEW_TOKENS) after left-padded prompts, without repetition and media tokens."""
    batch = prompts()
    ids, mask, cache = batch.input_ids, batch.attention_mask, None
    tokens, begin = ids, ids.shape[1]
    for _ in range(NEW_TOKENS):
        logits, cache = _step(model, ids, mask, cache)
        scores = logits[:, -1].scatter(1, tokens, -torch.inf)
        scores[:, [MEDIA_TOKEN, EOC_TOKEN]] = -torch.inf
        ids = scores.argmax(-1, keepdim=True)
        tokens, mask = torch.cat([tokens, ids], dim=1), F.pad(mask, (0, 1), value=1)
    return tokens[:, begin:]
