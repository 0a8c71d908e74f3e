"""The matrices of the vocabulary: foreign checkpoints keep them whole, a Flamingo the rows of its own tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration

LANGUAGE = "lang_encoder."


def vocabulary_names(model: FlamingoForConditionalGeneration) -> dict[str, nn.Module | None]:
    """Names of the input embedding and of the output head, each with the token rows that stand in for its own; a head that
    is the embedding again has the same ones."""
    lm, rows = model.lang_encoder, model.token_rows
    names = {module: f"{LANGUAGE}{name}.weight" for name, module in lm.named_modules()}
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    found = {names[embedding]: None if rows is None else rows.input}
    if head is not None:
        found[names[head]] = None if rows is None else rows.output or rows.input
    return found


def take_rows(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], where: object
) -> list[str]:
    """Give the model's token rows what the matrices of a checkpoint have for them. Returns the matrices it lacks.

    Raises UserError for a matrix that ends before them: its tokens are others; and for one matrix of the model that is two
    in the checkpoint.
    """
    if model.token_rows is None:
        return []
    ids, names, given = list(model.token_rows.token_ids), vocabulary_names(model), {}
    for name, rows in names.items():
        matrix = tensors.get(name)
        if matrix is None:
            continue
        if len(matrix) <= max(ids):
            raise UserError(
                f"{where}: its vocabulary ends at {len(matrix)} ({name}), the tokens added to the language model's reach "
                f"{max(ids)}; name the language model, and with it the tokenizer, that it was trained with"
            )
        if not matrix.equal(tensors[given.setdefault(rows, name)]):
            raise UserError(
                f"{where}: {' and '.join(names)} are one matrix in this language model, and two in the checkpoint"
            )
        rows.weight.data = matrix[ids].clone()
    return [name for name, rows in names.items() if rows not in given]


def whole_matrices(model: FlamingoForConditionalGeneration, size: int | None) -> dict[str, Tensor]:
    """The matrices of the vocabulary with the token rows in place, the first ``size`` rows, or all: (size, D)."""
    state, found = model.lang_encoder.state_dict(), {}
    embedding, *heads = vocabulary_names(model).items()
    for name, rows in (embedding, *heads):
        matrix = state[name.removeprefix(LANGUAGE)]
        if (
            rows is embedding[1]
            and name != embedding[0]
            and matrix.equal(state[embedding[0].removeprefix(LANGUAGE)])
        ):
            found[name] = found[embedding[0]]  # one matrix under two names stays one in the file
            continue
        if rows is not None:
            matrix = matrix.to(torch.promote_types(matrix.dtype, rows.weight.dtype), copy=True)
            matrix[list(model.token_rows.token_ids)] = rows.weight.detach().to(matrix.dtype)
        found[name] = matrix[:size].contiguous()
    bias = getattr(model.lang_encoder.get_output_embeddings(), "bias", None)
    return found if bias is None else found | {name.removesuffix("weight") + "bias": bias.detach()[:size]}
