"""The measurements on a Flamingo, through OpenFlamingo's interface only: the same code for both models."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerateOutput

from tests.golden import cases
from tests.golden.deterministic_weights import EMBEDDINGS
from tests.golden.sketch import sketch

GRADIENT_BUCKETS = 4
LOGIT_BUCKETS = 128
ZERO_GRADIENT = 1e-7

Parameters = Mapping[str, nn.Parameter]


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the floating dtype of `model`."""
    return next(model.parameters()).dtype


def pixels(model: nn.Module, batch: cases.Batch) -> Tensor:
    """Return the images of `batch` in the model's dtype."""
    return batch.vision_x.to(dtype_of(model))


def logits_and_loss(model: nn.Module, batch: cases.Batch, masked: bool) -> tuple[Tensor, Tensor]:
    """Return logits (B, T, vocabulary) and loss of a plain forward, with the attention mask or without it."""
    output = model(
        vision_x=pixels(model, batch),
        lang_x=batch.input_ids,
        attention_mask=batch.attention_mask if masked else None,
        labels=batch.labels,
    )
    return output.logits, output.loss


def gradients(model: nn.Module, parameters: Parameters, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of `loss` by name, for the parameters that have one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def gradient_unit(magnitude: float, largest: float) -> float:
    """Return the unit of the distance between two gradients whose largest entry is `magnitude`: that entry.

    Some gradients are mathematically zero (a key's bias: softmax ignores what all keys share) and consist of
    rounding errors. Below ZERO_GRADIENT of the `largest` gradient of the model, the unit is the latter.
    """
    return magnitude if magnitude > ZERO_GRADIENT * largest else largest


def gradient_table(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return (parameters by name, 1 + buckets): the largest magnitude of each gradient, then its sketch."""
    rows = [
        torch.cat([gradient.double().abs().max().reshape(1), sketch(gradient, GRADIENT_BUCKETS)])
        for _, gradient in sorted(gradients.items())
    ]
    return torch.stack(rows)


def real_positions(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the logits of the tokens that are not padding, (N, vocabulary)."""
    return logits[attention_mask.bool()]


@torch.no_grad()
def left_padded_logits(model: nn.Module) -> Tensor:
    """Return the logits of the left-padded batch, without padding tokens."""
    batch = cases.left_padded()
    return real_positions(logits_and_loss(model, batch, masked=True)[0], batch.attention_mask)


@torch.no_grad()
def cached_media_logits(model: nn.Module) -> dict[str, Tensor]:
    """Return the logits of prompts and continuations under cached media, as OpenFlamingo's evaluation does.

    prompt: the prompt. chunk: four tokens after it, from the key/value cache. token: the last of the same
    four, computed one by one. full: prompt and continuation in one forward. alone: the continuation without a
    past, all of which attends to the last image.
    """
    batch, continuation = cases.prompts(), cases.continuation()
    mask = torch.cat([batch.attention_mask, torch.ones_like(continuation)], dim=1)
    full = torch.cat([batch.input_ids, continuation], dim=1)

    def forward(
        ids: Tensor, attention_mask: Tensor | None, past: object = None, use_cache: bool = False
    ) -> object:
        return model(
            vision_x=None,
            lang_x=ids,
            attention_mask=attention_mask,
            clear_conditioned_layers=False,
            past_key_values=past,
            use_cache=use_cache,
        )

    model.cache_media(input_ids=batch.input_ids, vision_x=pixels(model, batch))
    prompt = forward(batch.input_ids, batch.attention_mask, use_cache=True)
    chunk = forward(continuation, mask, copy.deepcopy(prompt.past_key_values), use_cache=True)
    past = copy.deepcopy(prompt.past_key_values)
    for step in range(continuation.shape[1]):
        length = batch.input_ids.shape[1] + step + 1
        token = forward(continuation[:, step : step + 1], mask[:, :length], past, use_cache=True)
        past = token.past_key_values
    logits = {
        "prompt": real_positions(prompt.logits, batch.attention_mask),
        "chunk": chunk.logits,
        "token": token.logits,
        "full": real_positions(forward(full, mask).logits, mask),
        "alone": forward(continuation, None).logits,
    }
    model.uncache_media()
    return logits


@torch.no_grad()
def images_first_logits(model: nn.Module) -> Tensor:
    """Return the logits of the batch in which every row begins with an image."""
    return logits_and_loss(model, cases.images_first(), masked=False)[0]


@torch.no_grad()
def generated(model: nn.Module) -> dict[str, Tensor]:
    """Return tokens and scores of generation from the left-padded prompts.

    tokens.*: (B, T + new) of greedy search, beam search, and greedy search that stops early.
    scores.*: the logits of each greedy step (new, B, vocabulary), the scores of the beams (B,).
    """
    batch = cases.prompts()

    def generate(**options: object) -> GenerateOutput:
        return model.generate(
            vision_x=pixels(model, batch),
            lang_x=batch.input_ids,
            attention_mask=batch.attention_mask,
            return_dict_in_generate=True,
            **options,
        )

    greedy = generate(**cases.GENERATION, output_logits=True)
    beams = generate(**cases.GENERATION, num_beams=3, output_scores=True)
    fourth_new_token = int(greedy.sequences[0, batch.input_ids.shape[1] + 3])
    stopped = generate(**cases.GENERATION, eos_token_id=fourth_new_token)
    return {
        "tokens.greedy": greedy.sequences,
        "tokens.beams": beams.sequences,
        "tokens.greedy_stopped": stopped.sequences,
        "scores.greedy": torch.stack(greedy.logits),
        "scores.beams": beams.sequences_scores,
    }


def trained_as_open_flamingo(name: str) -> bool:
    """Return whether OpenFlamingo trains this parameter: perceiver, cross-attention or embeddings."""
    return name.startswith(("perceiver.", "gated_cross_attn_layers.")) or name.endswith(EMBEDDINGS)


def training_losses(model: nn.Module, parameters: Parameters) -> Tensor:
    """Return the loss before each of 20 AdamW steps, (steps,). Changes the weights."""
    model.requires_grad_(False)
    trainable = [p.requires_grad_(True) for name, p in parameters.items() if trained_as_open_flamingo(name)]
    optimizer = torch.optim.AdamW(trainable, lr=cases.LEARNING_RATE, weight_decay=0.1)
    batches = cases.training_batches()
    losses = []
    for step in range(cases.TRAINING_STEPS):
        loss = logits_and_loss(model, batches[step % len(batches)], masked=True)[1]
        losses.append(loss.detach().double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(True)
    return torch.stack(losses)
