"""Vocabulary matrices: foreign checkpoints store them in full, a Flamingo only the rows of its new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration

LANGUAGE_PREFIX = "lang_encoder."


def vocabulary_matrices(model: FlamingoForConditionalGeneration) -> dict[str, nn.Embedding | None]:
    """Return the names of the input embedding and the output head, in this order, each with its token rows.

    The token rows stand in for the matrix's own rows of new tokens; a head tied to the embedding shares its.
    """
    lm: Any = model.lang_encoder
    rows = model.token_rows
    names = {module: f"{LANGUAGE_PREFIX}{name}.weight" for name, module in lm.named_modules()}
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    matrices: dict[str, nn.Embedding | None] = {names[embedding]: None if rows is None else rows.input}
    if head is not None:
        matrices[names[head]] = None if rows is None else rows.output or rows.input
    return matrices


def load_token_rows(
    model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor], path: object
) -> list[str]:
    """Load the model's token rows from the checkpoint's matrices. Return the names of matrices that it lacks.

    Raises UserError for a vocabulary that ends before the new tokens, and for tied matrices with different
    values.
    """
    if model.token_rows is None:
        return []
    token_ids, matrices = list(model.token_rows.token_ids), vocabulary_matrices(model)
    loaded_from: dict[nn.Embedding, str] = {}  # token rows: the first matrix that they were loaded from
    for name, rows in matrices.items():
        matrix = tensors.get(name)
        if matrix is None or rows is None:
            continue
        if len(matrix) <= max(token_ids):
            raise UserError(
                f"{path}: its vocabulary ends at {len(matrix)} ({name}), but the new tokens of this language "
                f"model reach {max(token_ids)}; name the language model that it was trained with (--language)"
            )
        first = loaded_from.setdefault(rows, name)
        if not matrix.equal(tensors[first]):
            raise UserError(
                f"{path}: {' and '.join(matrices)} are tied in this language model, but differ in the "
                "checkpoint; name the language model that it was trained with (--language)"
            )
        rows.weight.data = matrix[token_ids].clone()
    return [name for name, rows in matrices.items() if rows not in loaded_from]


def full_vocabulary(model: FlamingoForConditionalGeneration, size: int | None) -> dict[str, Tensor]:
    """Return the vocabulary matrices (size, D) with the token rows filled in, and the bias of the output
    head.

    size: number of rows to keep; None keeps all. Tied matrices are one tensor under two names.
    """
    lm: Any = model.lang_encoder
    state = lm.state_dict()
    matrices = vocabulary_matrices(model)
    embedding_name, head_name = next(iter(matrices)), list(matrices)[-1]
    embedding = state[embedding_name.removeprefix(LANGUAGE_PREFIX)]
    full: dict[str, Tensor] = {}
    for name, rows in matrices.items():
        matrix = state[name.removeprefix(LANGUAGE_PREFIX)]
        shares_rows = name != embedding_name and rows is matrices[embedding_name]
        if shares_rows and matrix.equal(embedding):
            full[name] = full[embedding_name]
            continue
        if rows is not None and model.token_rows is not None:
            matrix = matrix.to(torch.promote_types(matrix.dtype, rows.weight.dtype), copy=True)
            matrix[list(model.token_rows.token_ids)] = rows.weight.detach().to(matrix.dtype)
        full[name] = matrix[:size].contiguous()
    bias = getattr(lm.get_output_embeddings(), "bias", None)
    if bias is not None:
        full[head_name.removesuffix("weight") + "bias"] = bias.detach()[:size]
    return full
