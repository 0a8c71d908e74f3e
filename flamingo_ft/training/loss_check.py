"""Is the loss that will be trained the language model's own?

TRL computes it from the last hidden state and the output head's matrix, never forming all logits. Families whose head
is more than a matrix (a transform, a scale that it does not know), or whose own loss is not shifted by one token, would
train on something else without a word.
"""

from __future__ import annotations

import torch
from trl import SFTTrainer

from flamingo_ft.errors import UserError
from flamingo_ft.machine_errors import reraise_machine_error

EXACT, ROUNDED = 1e-4, 0.02  # relative tolerance in float32, and where anything is rounded to fewer bits


@torch.no_grad()
def check_loss(trainer: SFTTrainer) -> None:
    """Compare both losses on a few words. Raises UserError when they differ."""
    model = trainer.model
    training = model.training
    model.eval()
    ids = _some_text(trainer).to(model.device)
    with trainer.compute_loss_context_manager():
        own = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        try:
            fused = float(model(input_ids=ids, labels=ids, fused_lm_head=True).loss)
        except (RuntimeError, AttributeError) as error:
            reraise_machine_error(error)
            raise UserError(
                _message(model, f"TRL cannot compute it ({str(error).splitlines()[0]})")
            ) from None
    model.train(training)
    exact = model.lang_encoder.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    if abs(own - fused) > (EXACT if exact else ROUNDED) * abs(own):
        raise UserError(_message(model, f"TRL computes {fused:.4f} where the model computes {own:.4f}"))


def _some_text(trainer: SFTTrainer) -> torch.Tensor:
    """Token ids (1, T) of a short text, none of them added by the Flamingo."""
    tokenizer = trainer.processing_class.tokenizer
    return tokenizer("A picture of a house by the sea.", add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]


def _message(model: torch.nn.Module, reason: str) -> str:
    family = model.config.get_text_config().model_type
    return f"model.language: the training loss of a {family} model is not its own: {reason}; choose another family"
