"""Score only the positions that predict a label.

The output head is the widest matrix of a language model, and most positions (prompts, images, padding)
predict no label. TRL's fused head skips those on a GPU only, and after the decoder has returned all of them.

Shapes: B rows, T tokens, N label tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

IGNORED = -100  # the label of a token that is not learned, in torch and in TRL


@dataclass(frozen=True)
class LabelPositions:
    """The label tokens of a batch, and where they are predicted.

    mask (B, T - 1): whether a position predicts a label. tokens (1, N): the labels. places (N, 2): row and
    column of the position that predicts each.
    """

    mask: Tensor
    tokens: Tensor
    places: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> LabelPositions:
        """Find the labels (B, T) that are not ignored. The first token of a row is never predicted."""
        next_tokens = labels[:, 1:]
        mask = next_tokens != IGNORED
        return cls(mask, next_tokens[mask][None], mask.nonzero())

    def restore(self, output: Any) -> Any:
        """Return the output of TRL's fused head on ``tokens`` as on the labels (B, T), in place.

        Its fields (1, N) become (B, T - 1), zero where there is no label.
        """
        for name, value in output.items():
            if isinstance(value, Tensor) and value.shape == self.tokens.shape:
                output[name] = self._restored(value)
        return output

    def _restored(self, values: Tensor) -> Tensor:
        restored = values.new_zeros(self.mask.shape)
        return restored.index_put((self.places[:, 0], self.places[:, 1]), values[0])
