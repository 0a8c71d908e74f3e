"""The output head as matrix and bias, for losses that multiply by the matrix themselves (TRL's fused head).

With the trained rows R (N, D) of N tokens in place, the matrix W (vocabulary, D) of a frozen head would be copied, and
given a gradient of its own size, at each step. A loss that is about to score hidden states h gets instead

    [h, h R^T, 0]  and  [W with zeros in these N rows, one column per row that selects its score, 0]

whose product is the same logits. The gradients of h and R flow through the appended scores, and the matrix needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from flamingo_ft.errors import UserError

ALIGNMENT = (
    8  # columns; matrix products of half precision are slow on a GPU where widths are no multiple of it
)


class OutputHead:
    """The head of a language model with ``rows`` (N, D) in place of those of ``token_ids``.

    weight (vocabulary, D), or with ``apart`` the matrix to multiply `with_scores` by; bias (vocabulary,) or None.
    """

    def __init__(self, head: nn.Module, token_ids: Sequence[int], rows: Callable[[], Tensor], apart: bool):
        self._head, self._token_ids, self._rows, self._apart = head, token_ids, rows, apart
        self.bias = None if head.bias is None else _gathered(head.bias)

    @cached_property
    def weight(self) -> Tensor:
        """Made when it is first needed. UserError for a quantized head, whose packed numbers are no such matrix."""
        matrix = self._head.weight
        if not matrix.is_floating_point():
            raise UserError(
                f"output head: quantized, got a weight of {matrix.dtype}; load the language model with its head left "
                "out of the quantization (llm_int8_skip_modules)"
            )
        matrix = _gathered(matrix)
        if self._apart:
            return RowsApart(matrix.detach(), self._token_ids)
        ids = torch.tensor(self._token_ids, device=matrix.device)
        return matrix.index_copy(0, ids, self._rows().to(matrix))


def with_scores(hidden: Tensor, rows: Tensor) -> Tensor:
    """Hidden states (..., D) with their products with ``rows`` (N, D) appended: (..., D + columns)."""
    scores = functional.linear(hidden, rows.to(hidden)).to(hidden.dtype)
    padding = hidden.new_zeros(*hidden.shape[:-1], _columns(len(rows)) - len(rows))
    return torch.cat([hidden, scores, padding], dim=-1)


class RowsApart(Tensor):
    """The second of the matrices above, (vocabulary, D + columns), without a gradient; only slices of it are ever made.

    Any other operation makes it whole first.
    """

    _is_param = (
        True  # as much a part of the model as the matrix behind it: offloading of activations leaves it alone
    )
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, matrix: Tensor, token_ids: Sequence[int]) -> RowsApart:
        size = len(matrix), matrix.shape[1] + _columns(len(token_ids))
        return Tensor._make_wrapper_subclass(cls, size, dtype=matrix.dtype, device=matrix.device)

    def __init__(self, matrix: Tensor, token_ids: Sequence[int]):
        self._matrix, self._token_ids = matrix, tuple(token_ids)

    def __getitem__(self, rows: Any) -> Tensor:
        if not isinstance(rows, slice):
            return self._slice(0, len(self))[rows]
        start, stop, step = rows.indices(len(self))
        return self._slice(start, stop)[::step]

    def _slice(self, start: int, stop: int) -> Tensor:
        width = self._matrix.shape[1]
        part = self._matrix.new_empty(max(0, stop - start), self.shape[1])
        part[:, :width] = self._matrix[start:stop]
        part[:, width:] = 0
        inside = [(token, column) for column, token in enumerate(self._token_ids) if start <= token < stop]
        if inside:
            tokens, columns = torch.tensor(inside, device=part.device).unbind(1)
            part[tokens - start] = 0
            part[tokens - start, width + columns] = 1
        return part

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda lazy: lazy[:], (args, kwargs or {}))
        return function(*args, **kwargs)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _columns(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
