"""The embedding rows of the tokens that a Flamingo adds to its language model's vocabulary.

Only these rows train; the language model's own matrices stay as they are. A row here stands in for the one of the same
token in the language model whenever that runs as part of a Flamingo. Frozen rows for the new tokens cost OpenFlamingo
4.6 CIDEr and 12.1 VQAv2 points (arXiv:2308.01390, table 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conditioning import MediaConditioning


class TokenRows(nn.Module):
    """Input rows (N, D) of N tokens, and their output rows, which are the same table where the model ties them."""

    def __init__(self, token_ids: Sequence[int], lm: nn.Module):
        super().__init__()
        self.token_ids = tuple(token_ids)
        self.input = nn.Embedding(len(self.token_ids), lm.get_input_embeddings().embedding_dim)
        head = lm.get_output_embeddings()
        shared = head is None or _are_tied(lm)
        self.output = None if shared else nn.Embedding(len(self.token_ids), head.in_features)

    def attach(self, lm: nn.Module, conditioning: MediaConditioning) -> None:
        """Let the rows stand in inside ``lm`` while ``conditioning`` is open."""
        self._conditioning = conditioning
        lm.get_input_embeddings().register_forward_hook(self._after_embedding)
        if lm.get_output_embeddings() is not None:
            lm.get_output_embeddings().register_forward_hook(self._after_head)

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

    def input_rows(self) -> Tensor:
        """(N, D), through the module, so that an adapter around it takes part."""
        return self.input(self._index())

    def output_rows(self) -> Tensor:
        """(N, D) rows of the output head."""
        return self.input_rows() if self.output is None else self.output(self._index())

    def head_with_rows(self, head: nn.Module) -> OutputHead:
        """The output head's matrix with these rows in place, for code that multiplies by it itself."""
        ids = torch.tensor(self.token_ids, device=head.weight.device)
        return OutputHead(head.weight.index_copy(0, ids, self.output_rows().to(head.weight)), head.bias)

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
    return head is embedding or pair in lm.all_tied_weights_keys.items() or pair[::-1] in lm.all_tied_weights_keys.items()


class OutputHead:
    """An output head as matrix and bias, ``weight`` (vocabulary, D) and ``bias`` (vocabulary,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias
