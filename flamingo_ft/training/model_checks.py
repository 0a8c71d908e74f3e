"""Checks that a language model trains as intended: with its own loss, packed documents kept apart."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from trl import DPOTrainer, SFTTrainer

from flamingo_ft.errors import UserError
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

DOCUMENT_LENGTHS = (7, 5, 9)  # tokens
LOSS_RTOL, LOSS_RTOL_ROUNDED = 1e-4, 0.02  # in float32, and with any lower precision
# Relative to the largest logit.
LOGITS_TOLERANCE, LOGITS_TOLERANCE_ROUNDED = 1e-4, 0.05


@torch.no_grad()
def check_loss(trainer: SFTTrainer | DPOTrainer) -> None:
    """Compare TRL's loss with the model's own on a short text. Raise UserError if they differ.

    TRL computes it from the last hidden state and the output head's matrix, never forming all logits. That is
    wrong, without any error, for families whose head is more than a matrix (a transform, a scale unknown to
    TRL) or whose own loss does not shift labels by one token.
    """
    model = cast(FlamingoForConditionalGeneration, trainer.model)
    was_training = model.training
    model.eval()
    processor = cast(FlamingoProcessor, trainer.processing_class)
    ids = _sample_text(processor).to(model.device)
    with trainer.compute_loss_context_manager():
        own = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        try:
            fused = float(model(input_ids=ids, labels=ids, fused_lm_head=True).loss)
        except (RuntimeError, AttributeError) as error:
            reraise_machine_error(error)
            raise UserError(
                _loss_message(model, f"TRL cannot compute it ({str(error).splitlines()[0]})")
            ) from None
    model.train(was_training)
    exact = model.lang_encoder.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    if abs(own - fused) > (LOSS_RTOL if exact else LOSS_RTOL_ROUNDED) * abs(own):
        raise UserError(_loss_message(model, f"TRL computes {fused:.4f}, the model computes {own:.4f}"))


def _sample_text(processor: FlamingoProcessor) -> Tensor:
    """Return token ids (1, T) of a short text without tokens that the Flamingo added."""
    encoded = processor.tokenizer(
        "A picture of a house by the sea.", add_special_tokens=False, return_tensors="pt"
    )
    return encoded["input_ids"]


def _loss_message(model: FlamingoForConditionalGeneration, reason: str) -> str:
    family = model.config.get_text_config().model_type
    return (
        f"model.language: the training loss of a {family} model would not be its own: {reason}; "
        "choose another model family"
    )


@torch.no_grad()
def check_packing(model: FlamingoForConditionalGeneration, rows: int = 1) -> None:
    """Compare documents packed into one row, in a batch of ``rows`` such rows, with each document alone.

    Raise UserError if their logits differ. transformers separates documents in self-attention where positions
    start again at 0, for families that build their masks the usual way. With positions from the mask (ALiBi),
    with a state that runs along the row (state-space models, recurrences, convolutions) or with some
    attention kernels, documents would read each other without any error.
    """
    was_training = model.training
    model.eval()
    ids = _random_tokens(model)
    try:
        packed = model(input_ids=ids.expand(rows, -1), **_packing_inputs(ids, rows)).logits[-1]
    except (TypeError, ValueError, RuntimeError) as error:
        reraise_machine_error(error)
        reason = f"does not accept document boundaries ({str(error).splitlines()[0]})"
        raise UserError(_packing_message(model, reason)) from None
    finally:
        model.train(was_training)
    model.eval()
    documents = ids.split(DOCUMENT_LENGTHS, dim=1)
    alone = torch.cat([model(input_ids=document, use_cache=False).logits[0] for document in documents])
    model.train(was_training)
    exact = model.lang_encoder.dtype == torch.float32
    tolerance = (LOGITS_TOLERANCE if exact else LOGITS_TOLERANCE_ROUNDED) * alone.abs().max()
    if not (packed - alone).abs().max() <= tolerance:
        raise UserError(_packing_message(model, "attends across document boundaries"))


def _random_tokens(model: FlamingoForConditionalGeneration) -> Tensor:
    """Return token ids (1, T), none of them a media token or another added one."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    first_added = min([cast(int, config.media_token_id), *(config.new_token_ids or [])])
    return torch.randint(first_added, (1, sum(DOCUMENT_LENGTHS)), generator=generator).to(model.device)


def _packing_inputs(ids: Tensor, rows: int) -> dict[str, Tensor]:
    """Return document ids and position ids (rows, T) of the packed documents."""
    documents = torch.cat([torch.full((length,), index) for index, length in enumerate(DOCUMENT_LENGTHS)])
    positions = torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])
    inputs = {"document_ids": documents, "position_ids": positions}
    return {name: tensor.to(ids.device).expand(rows, -1) for name, tensor in inputs.items()}


def _packing_message(model: FlamingoForConditionalGeneration, reason: str) -> str:
    family = model.config.get_text_config().model_type
    return (
        f"data.packing: a {family} model {reason}; set data.packing to false "
        "(data.group_by_length=true also reduces padding)"
    )
