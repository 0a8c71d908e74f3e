"""The embedding rows of the tokens that a Flamingo adds to its language model's vocabulary.

Only these rows train; the language model's own matrices stay as they are. A row here stands in for the one of the same
token in the language model whenever that runs as part of a Flamingo. Frozen rows for the new tokens cost OpenFlamingo
4.6 CIDEr and 12.1 VQAv2 points (arXiv:2308.01390, table 5).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .conditioning import MediaConditioning
from .output_head import OutputHead, with_scores


class TokenRows(nn.Module):
    """Input rows (N, D) of N tokens, and their output rows, which are the same table where the model ties them."""

    def __init__(self, token_ids: Sequence[int], lm: nn.Module):
        super().__init__()
        self.token_ids = tuple(token_ids)
        self.input = nn.Embedding(len(self.token_ids), lm.get_input_embeddings().embedding_dim)
        head = lm.get_output_embeddings()
        shared = head is None or _are_tied(lm)
        self.output = None if shared else nn.Embedding(len(self.token_ids), head.in_features)
        self._scoring = _Scoring()

    def attach(self, lm: nn.Module, conditioning: MediaConditioning) -> None:
        """Let the rows stand in inside ``lm`` while ``conditioning`` is open."""
        self._conditioning = conditioning
        self._hooked: list[tuple[nn.Module | None, RemovableHandle | None]] = []
        self.follow(lm)

    def follow(self, lm: nn.Module) -> None:
        """Hook the embedding and the head that ``lm`` has now: resizing and setting them puts others in their place."""
        modules = lm.get_input_embeddings(), lm.get_output_embeddings()
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
    def reset(self, lm: nn.Module, known: int) -> None:
        """Start every row at the mean of the first ``known`` rows of the language model's own matrix."""
        self.input.weight.copy_(lm.get_input_embeddings().weight[:known].float().mean(0))
        if self.output is not None:
            self.output.weight.copy_(lm.get_output_embeddings().weight[:known].float().mean(0))

    @torch.no_grad()
    def copy_from(self, lm: nn.Module) -> None:
        """Take the rows that the language model itself has for these tokens."""
        ids = list(self.token_ids)
        self.input.weight.copy_(lm.get_input_embeddings().weight[ids])
        if self.output is not None:
            self.output.weight.copy_(lm.get_output_embeddings().weight[ids])

    @torch.no_grad()
    def extend(self, token_ids: Sequence[int], lm: nn.Module) -> None:
        """Add rows for more tokens, in new parameters; they start as those that ``lm`` has for them."""
        for table, matrix in (
            (self.input, lm.get_input_embeddings()),
            (self.output, lm.get_output_embeddings()),
        ):
            if table is not None:
                rows = torch.cat([table.weight, matrix.weight[list(token_ids)].to(table.weight)])
                table.weight, table.num_embeddings = nn.Parameter(rows, table.weight.requires_grad), len(rows)
        self.token_ids += tuple(token_ids)

    def input_rows(self) -> Tensor:
        """(N, D), through the module, so that an adapter around it takes part."""
        return self.input(self._index())

    def output_rows(self) -> Tensor:
        """(N, D) rows of the output head."""
        return self.input_rows() if self.output is None else self.output(self._index())

    def head_with_rows(self, head: nn.Module) -> OutputHead:
        """The output head's matrix with these rows in place, for code that multiplies by it itself."""
        return OutputHead(head, self.token_ids, self.output_rows, self._scoring.apart)

    @contextmanager
    def scored_apart(self, head: nn.Module) -> Iterator[None]:
        """Inside the block `head_with_rows` gives the frozen matrix, for hidden states as `before_head` gives them."""
        outer, self._scoring.apart = self._scoring.apart, not head.weight.requires_grad
        try:
            yield
        finally:
            self._scoring.apart = outer

    def before_head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) for the matrix of `head_with_rows`: inside `scored_apart` with the rows' scores."""
        return with_scores(hidden, self.output_rows()) if self._scoring.apart else hidden

    def _index(self) -> Tensor:
        return torch.arange(len(self.token_ids), device=self.input.weight.device)

    def _after_embedding(self, embedding: nn.Module, args: tuple, embedded: Tensor) -> Tensor | None:
        if not self._conditioning.is_open:
            return None
        scale = getattr(embedding, "embed_scale", 1.0)  # some families scale inside their embedding (Gemma 3)
        rows = (self.input_rows() * scale).to(embedded.dtype)
        for token_id, row in zip(self.token_ids, rows, strict=True):
            embedded = torch.where((args[0] == token_id)[..., None], row, embedded)
        return embedded

    def _after_head(self, head: nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        if not self._conditioning.is_open:
            return None
        rows = self.output_rows().to(logits.dtype)
        bias = None if head.bias is None else head.bias[list(self.token_ids)].to(logits.dtype)
        scores = nn.functional.linear(args[0].to(logits.dtype), rows, bias)
        # In place: a copy would double the largest tensor of a training step.
        return logits.index_copy_(-1, torch.tensor(self.token_ids, device=logits.device), scores)


def _are_tied(lm: nn.Module) -> bool:
    """Whether head and embedding are one matrix, also before weights are loaded; configurations do not always tell."""
    head, embedding = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    names = {id(parameter): name for name, parameter in lm.named_parameters(remove_duplicate=False)}
    pair = names[id(head)], names[id(embedding)]
    return (
        head is embedding
        or pair in lm.all_tied_weights_keys.items()
        or pair[::-1] in lm.all_tied_weights_keys.items()
    )


class _Scoring(threading.local):
    """Whether the loss of this thread's forward scores the rows apart. A copy starts with no such loss."""

    apart = False

    def __reduce__(self) -> tuple:
        return _Scoring, ()
