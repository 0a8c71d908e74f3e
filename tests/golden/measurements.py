"""What is measured on a Flamingo, through OpenFlamingo's interface alone: one path for both models."""

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
    """The one floating dtype of `model`."""
    return next(model.parameters()).dtype


def pixels(model: nn.Module, batch: cases.Batch) -> Tensor:
    """The images of `batch` in the model's dtype."""
    return batch.vision_x.to(dtype_of(model))


def logits_and_loss(model: nn.Module, batch: cases.Batch, masked: bool) -> tuple[Tensor, Tensor]:
    """(B, T, vocabulary) logits and the loss of a plain forward, with the attention mask or without one."""
    output = model(
        vision_x=pixels(model, batch),
        lang_x=batch.input_ids,
        attention_mask=batch.attention_mask if masked else None,
        labels=batch.labels,
    )
    return output.logits, output.loss


def gradients(model: nn.Module, parameters: Parameters, loss: Tensor) -> dict[str, Tensor]:
    """Name -> gradient of `loss`, for the parameters it reaches."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradient_unit(magnitude: float, largest: float) -> float:
    """The unit in which two versions of a gradient with this largest `magnitude` are compared: the magnitude.

    Some gradients are zero by nature (a key's bias: softmax ignores what all keys share) and hold rounding
    alone. Below ZERO_GRADIENT of the `largest` gradient of the model, that one is the unit.
    """
    return magnitude if magnitude > ZERO_GRADIENT * largest else largest


def gradient_table(found: Mapping[str, Tensor]) -> Tensor:
    """(parameters sorted by name, 1 + buckets): the largest magnitude of each gradient, then its sketch."""
    rows = [
        torch.cat([found[name].double().abs().max().reshape(1), sketch(found[name], GRADIENT_BUCKETS)])
        for name in sorted(found)
    ]
    return torch.stack(rows)


def real_positions(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, vocabulary): the logits of the tokens that are not padding."""
    return logits[attention_mask.bool()]


@torch.no_grad()
def left_padded_logits(model: nn.Module) -> Tensor:
    """Logits at the real tokens of the left-padded batch."""
    batch = cases.left_padded()
    return real_positions(logits_and_loss(model, batch, masked=True)[0], batch.attention_mask)


@torch.no_grad()
def cached_media_logits(model: nn.Module) -> dict[str, Tensor]:
    """Scoring continuations of one prompt as OpenFlamingo's evaluation does: images cached, then the
    key/value cache.

    prompt: the prompt under cached media. chunk: four tokens after it. token: the same four one by one, the
    last one's logits. full: prompt and continuation in one forward under the same cached media. alone: the
    continuation without a past; with media cached, all of it looks at the last image.
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
        seen = batch.input_ids.shape[1] + step + 1
        token = forward(continuation[:, step : step + 1], mask[:, :seen], past, use_cache=True)
        past = token.past_key_values
    found = {
        "prompt": real_positions(prompt.logits, batch.attention_mask),
        "chunk": chunk.logits,
        "token": token.logits,
        "full": real_positions(forward(full, mask).logits, mask),
        "alone": forward(continuation, None).logits,
    }
    model.uncache_media()
    return found


@torch.no_grad()
def images_first_logits(model: nn.Module) -> Tensor:
    """Logits of the batch in which every row begins with an image."""
    return logits_and_loss(model, cases.images_first(), masked=False)[0]


@torch.no_grad()
def generated(model: nn.Module) -> dict[str, Tensor]:
    """tokens.*: (B, T + new) of greedy and beam search on the left-padded prompts, and of a greedy one that
    stops early; scores.*: the greedy steps' logits (new, B, vocabulary), the beams' scores (B,)."""
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
    """Whether OpenFlamingo's factory lets this parameter train: perceiver, cross-attention, embeddings."""
    return name.startswith(("perceiver.", "gated_cross_attn_layers.")) or name.endswith(EMBEDDINGS)


def training_losses(model: nn.Module, parameters: Parameters) -> Tensor:
    """(steps,) the loss before each of 20 AdamW steps on a fixed sequence of batches. Changes the weights."""
    model.requires_grad_(False)
    trained = [p.requires_grad_(True) for name, p in parameters.items() if trained_as_open_flamingo(name)]
    optimizer = torch.optim.AdamW(trained, lr=cases.LEARNING_RATE, weight_decay=0.1)
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
