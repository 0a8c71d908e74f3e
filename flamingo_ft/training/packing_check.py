"""Does the language model keep packed documents apart?

transformers does so in self-attention from positions that begin anew, for the families that build their masks its usual
way. Where positions come from the mask (ALiBi), where a state runs along the row (state-space models, recurrences,
convolutions), or where an attention kernel sees but one row, documents would read each other without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoForConditionalGeneration

LENGTHS = (7, 5, 9)  # of documents, in tokens
EXACT, ROUNDED = (
    1e-4,
    0.05,
)  # share of the largest logit in float32, and where anything is rounded to fewer bits


@torch.no_grad()
def check_packing(model: FlamingoForConditionalGeneration, rows: int = 1) -> None:
    """Compare a few documents in one row, in a batch of ``rows`` such rows, with each alone.

    Raises UserError where their logits differ.
    """
    training = model.training
    model.eval()
    ids = _some_tokens(model)
    try:
        packed = model(input_ids=ids.expand(rows, -1), **_marks(ids, rows)).logits[-1]
    except (TypeError, ValueError, RuntimeError) as error:
        reraise_machine_error(error)
        raise UserError(
            _message(model, f"cannot be told where each begins ({str(error).splitlines()[0]})")
        ) from None
    finally:
        model.train(training)
    model.eval()
    alone = torch.cat(
        [model(input_ids=part, use_cache=False).logits[0] for part in ids.split(LENGTHS, dim=1)]
    )
    model.train(training)
    exact = model.lang_encoder.dtype == torch.float32
    if not (packed - alone).abs().max() <= (EXACT if exact else ROUNDED) * alone.abs().max():
        raise UserError(_message(model, "reads across their borders"))


def _some_tokens(model: FlamingoForConditionalGeneration) -> Tensor:
    """Token ids (1, T), none of them an image's."""
    dice = torch.Generator().manual_seed(0)
    known = min(min(model.config.new_token_ids or [model.config.media_token_id]), model.config.media_token_id)
    return torch.randint(known, (1, sum(LENGTHS)), generator=dice).to(model.device)


def _marks(ids: Tensor, rows: int) -> dict[str, Tensor]:
    documents = torch.cat([torch.full((length,), number) for number, length in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    marks = {"document_ids": documents, "position_ids": positions}
    return {name: mark.to(ids.device).expand(rows, -1) for name, mark in marks.items()}


def _message(model: FlamingoForConditionalGeneration, reason: str) -> str:
    family = model.config.get_text_config().model_type
    return (
        f"data.packing: a {family} model {reason}; set data.packing to false (data.group_by_length saves too)"
    )
