"""The embedding rows of the tokens that a Flamingo adds to its language model, and the output head with them.

Only these rows are trained; the language model's own matrices stay as they are. A row here replaces the row
of the same token whenever the language model runs as part of a Flamingo. Frozen rows for the new tokens cost
OpenFlamingo 4.6 CIDEr and 12.1 VQAv2 points (arXiv:2308.01390, table 5).

A loss that multiplies by the output matrix itself (TRL's fused head) gets the head as matrix and bias,
`OutputHead`. With the trained rows R (N, D) put in place, the frozen matrix W (vocabulary, D) would be copied
and get a gradient of its own size at each step. Instead, the hidden states h and W are extended to

    [h, h R^T, 0]  and  [W with zeros in these N rows, one column per row with a 1 at that token, 0]

whose product is the same logits. The gradients of h and R flow through the appended scores, and W needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flamingo_ft.errors import UserError

from .compat import WrapperTensor, tree_map_only
from .conditioning import MediaConditioning

# Columns: half-precision matrix products are slow on a GPU for widths that are not a multiple of it.
ALIGNMENT = 8


def input_embedding(lm: PreTrainedModel) -> nn.Embedding:
    """Return the language model's embedding, under its real type."""
    return cast("nn.Embedding", lm.get_input_embeddings())


def output_head(lm: PreTrainedModel) -> nn.Linear | None:
    """Return the language model's output head, under its real type; None for a model without one."""
    return cast("nn.Linear | None", lm.get_output_embeddings())


def _head_of(lm: PreTrainedModel) -> nn.Linear:
    """Return the output head of a language model that has one."""
    head = output_head(lm)
    assert head is not None, "rows for the output head, but the language model has none"
    return head


class TokenRows(nn.Module):
    """Input and output rows (N, D) of N tokens; one table for both if the model ties its matrices."""

    def __init__(self, token_ids: Sequence[int], lm: PreTrainedModel):
        super().__init__()
        self.token_ids = tuple(token_ids)
        self.input = nn.Embedding(len(self.token_ids), input_embedding(lm).embedding_dim)
        head = output_head(lm)
        own_output = head is not None and not _are_tied(lm, head)
        self.output = nn.Embedding(len(self.token_ids), head.in_features) if own_output else None
        self._scoring = _Scoring()

    def attach(self, lm: PreTrainedModel, conditioning: MediaConditioning) -> None:
        """Hook the rows onto ``lm``; they replace its own while ``conditioning`` is open."""
        self._conditioning = conditioning
        self._hooked: list[tuple[nn.Module | None, RemovableHandle | None]] = []
        self.follow(lm)

    def follow(self, lm: PreTrainedModel) -> None:
        """Move the hooks to the embedding and output head that ``lm`` has now: resizing replaces them."""
        modules = input_embedding(lm), output_head(lm)
        if [id(module) for module, _ in self._hooked] == [id(module) for module in modules]:
            return
        for _, handle in self._hooked:
            if handle is not None:
                handle.remove()
        hooks = self._after_embedding, self._after_head
        pairs = zip(modules, hooks, strict=True)
        self._hooked = [
            (one, None if one is None else one.register_forward_hook(hook)) for one, hook in pairs
        ]

    @torch.no_grad()
    def reset(self, lm: PreTrainedModel, known: int) -> None:
        """Initialize every row with the mean of the first ``known`` rows of the language model's matrix."""
        self.input.weight.copy_(input_embedding(lm).weight[:known].float().mean(0))
        if self.output is not None:
            self.output.weight.copy_(_head_of(lm).weight[:known].float().mean(0))

    @torch.no_grad()
    def spell_out(self, lm: PreTrainedModel, spellings: Mapping[int, Sequence[int]]) -> None:
        """Initialize the input rows of some tokens, by id, with the mean of the rows of what spells them.

        Unlike the mean of all, which `reset` gives to each, these rows differ from the start.
        """
        embeddings = input_embedding(lm).weight
        for token, pieces in spellings.items():
            if token in self.token_ids:
                row = embeddings[list(pieces)].float().mean(0)
                self.input.weight[self.token_ids.index(token)] = row

    @torch.no_grad()
    def copy_from(self, lm: PreTrainedModel) -> None:
        """Copy the rows that the language model itself has for these tokens."""
        ids = list(self.token_ids)
        self.input.weight.copy_(input_embedding(lm).weight[ids])
        if self.output is not None:
            self.output.weight.copy_(_head_of(lm).weight[ids])

    @torch.no_grad()
    def extend(self, token_ids: Sequence[int], lm: PreTrainedModel) -> None:
        """Add rows for more tokens, copied from ``lm``. The parameters are replaced by larger ones."""
        for table, module in ((self.input, input_embedding(lm)), (self.output, output_head(lm))):
            if table is not None and module is not None:
                rows = torch.cat([table.weight, module.weight[list(token_ids)].to(table.weight)])
                table.weight, table.num_embeddings = nn.Parameter(rows, table.weight.requires_grad), len(rows)
        self.token_ids += tuple(token_ids)

    def input_rows(self) -> Tensor:
        """Return the input rows (N, D), through the module's forward, so that a PEFT wrapper applies."""
        return self.input(self._index())

    def output_rows(self) -> Tensor:
        """Return the output rows (N, D)."""
        return self.input_rows() if self.output is None else self.output(self._index())

    def head_with_rows(self, head: Any) -> OutputHead:
        """Return the output head with these rows in its matrix, for code that uses the matrix itself."""
        return OutputHead(head, self.token_ids, self.output_rows, self._scoring.apart)

    @contextmanager
    def scored_apart(self, head: Any) -> Generator[None]:
        """Inside the ``with`` block, `head_with_rows` and `before_head` return the extended W and h."""
        outer, self._scoring.apart = self._scoring.apart, not head.weight.requires_grad
        try:
            yield
        finally:
            self._scoring.apart = outer

    def before_head(self, hidden: Tensor) -> Tensor:
        """Return hidden states (..., D) for `head_with_rows`.

        The rows' scores are appended inside `scored_apart`.
        """
        return with_scores(hidden, self.output_rows()) if self._scoring.apart else hidden

    def _index(self) -> Tensor:
        return torch.arange(len(self.token_ids), device=self.input.weight.device)

    def _after_embedding(self, embedding: Any, args: tuple, embedded: Tensor) -> Tensor | None:
        if not self._conditioning.is_open:
            return None
        scale = getattr(embedding, "embed_scale", 1.0)  # Gemma 3 and others scale inside their embedding
        rows = (self.input_rows() * scale).to(embedded.dtype)
        for token_id, row in zip(self.token_ids, rows, strict=True):
            embedded = torch.where((args[0] == token_id)[..., None], row, embedded)
        return embedded

    def _after_head(self, head: Any, args: tuple, logits: Tensor) -> Tensor | None:
        if not self._conditioning.is_open:
            return None
        rows = self.output_rows().to(logits.dtype)
        bias = None if head.bias is None else head.bias[list(self.token_ids)].to(logits.dtype)
        scores = nn.functional.linear(args[0].to(logits.dtype), rows, bias)
        # In place: the logits are the largest tensor of a training step.
        return logits.index_copy_(-1, torch.tensor(self.token_ids, device=logits.device), scores)


def _are_tied(lm: PreTrainedModel, head: nn.Linear) -> bool:
    """Return whether head and embedding share a matrix, also before loading; configs may not say."""
    embedding = input_embedding(lm).weight
    names = {id(parameter): name for name, parameter in lm.named_parameters(remove_duplicate=False)}
    pair = names[id(head.weight)], names[id(embedding)]
    return (
        head.weight is embedding
        or pair in lm.all_tied_weights_keys.items()
        or pair[::-1] in lm.all_tied_weights_keys.items()
    )


class _Scoring(threading.local):
    """The state of this thread: whether it is inside `scored_apart`. A copy starts outside."""

    apart = False

    def __reduce__(self) -> tuple:
        return _Scoring, ()


class OutputHead:
    """The head of a language model with ``rows`` (N, D) in place of those of ``token_ids``.

    weight (vocabulary, D), or with ``apart`` the matrix to multiply `with_scores` by; bias (vocabulary,) or
    None.
    """

    def __init__(self, head: Any, token_ids: Sequence[int], rows: Callable[[], Tensor], apart: bool):
        self._head, self._token_ids, self._rows, self._apart = head, token_ids, rows, apart
        self.bias = None if head.bias is None else _gathered(head.bias)

    @cached_property
    def weight(self) -> Tensor:
        """The matrix, computed on first use. Raises UserError for a quantized head: it is packed."""
        matrix = self._head.weight
        if not matrix.is_floating_point():
            raise UserError(
                f"output head: quantized, got a weight of {matrix.dtype}; exclude it from quantization when "
                "loading the language model (llm_int8_skip_modules)"
            )
        matrix = _gathered(matrix)
        if self._apart:
            return RowsApart(matrix.detach(), self._token_ids)
        ids = torch.tensor(self._token_ids, device=matrix.device)
        return matrix.index_copy(0, ids, self._rows().to(matrix))


def with_scores(hidden: Tensor, rows: Tensor) -> Tensor:
    """Append to hidden states (..., D) their products with ``rows`` (N, D) and padding: (..., D + columns)"""
    scores = functional.linear(hidden, rows.to(hidden)).to(hidden.dtype)
    padding = hidden.new_zeros(*hidden.shape[:-1], _columns(len(rows)) - len(rows))
    return torch.cat([hidden, scores, padding], dim=-1)


class RowsApart(WrapperTensor):
    """The extended W (vocabulary, D + columns) of the module's docstring, without gradient.

    Slicing materializes the slice, any other operation the whole.
    """

    @staticmethod
    def __new__(cls, matrix: Tensor, token_ids: Sequence[int]) -> RowsApart:
        return cls.make((len(matrix), matrix.shape[1] + _columns(len(token_ids))), like=matrix)

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
    # pyrefly: ignore[bad-override]
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda lazy: lazy[:], (args, kwargs or {}))
        return func(*args, **kwargs)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _columns(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
