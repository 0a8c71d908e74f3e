"""What is measured on a tiny MosaicGPT, the original or this package's, through the calls that both take.

Six heads: only with a number that is no power of two does it show that the slopes of ALiBi are not those of
transformers' MPT.
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
    """Logits of a left-padded batch, those of a continuation token by token, and what greedy search finds."""
    batch = left_padded()
    with torch.no_grad():
        logits = real_positions(_logits(model, batch), batch.attention_mask)
        return {"left_padded": logits, "continued": _continued(model), "greedy": _greedy(model)}


def loss_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the left-padded batch, and the gradient of every parameter."""
    batch = left_padded()
    logits = _logits(model, batch)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels(batch)[:, 1:].flatten())
    parameters = dict(model.named_parameters())
    return loss.detach(), gradients(model, parameters, loss)


def labels(batch: Batch) -> Tensor:
    """The batch's labels without those that padding would predict."""
    behind_padding = F.pad(batch.attention_mask, (1, -1), value=1) == 0
    return batch.labels.masked_fill(behind_padding, -100)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.input_ids, attention_mask=batch.attention_mask.bool(), use_cache=False).logits


def _step(model: nn.Module, ids: Tensor, mask: Tensor, cache: object) -> tuple[Tensor, object]:
    """Logits (B, T, vocabulary) of tokens behind those in the cache, and the cache with them."""
    output = model(ids, attention_mask=mask.bool(), past_key_values=cache, use_cache=True)
    return output.logits, output["cache" if "cache" in output else "past_key_values"]


def _continued(model: nn.Module) -> Tensor:
    """Logits (B, T, vocabulary) after left-padded prompts, each token from the cache of those before."""
    batch, found = prompts(), []
    mask = batch.attention_mask
    _, cache = _step(model, batch.input_ids, mask, None)
    for token in continuation().unbind(1):
        mask = F.pad(mask, (0, 1), value=1)
        logits, cache = _step(model, token[:, None], mask, cache)
        found.append(logits)
    return torch.cat(found, dim=1)


def _greedy(model: nn.Module) -> Tensor:
    """Tokens (B, NEW_TOKENS) behind left-padded prompts, the likeliest each time of those that are not in the
    row yet; no token of the Flamingo's."""
    batch = prompts()
    ids, mask, cache = batch.input_ids, batch.attention_mask, None
    seen, begin = ids, ids.shape[1]
    for _ in range(NEW_TOKENS):
        logits, cache = _step(model, ids, mask, cache)
        scores = logits[:, -1].scatter(1, seen, -torch.inf)
        scores[:, [MEDIA_TOKEN, EOC_TOKEN]] = -torch.inf
        ids = scores.argmax(-1, keepdim=True)
        seen, mask = torch.cat([seen, ids], dim=1), F.pad(mask, (0, 1), value=1)
    return seen[:, begin:]
