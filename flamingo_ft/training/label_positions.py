"""Scoring only the positions that predict a label.

The output head is the widest matrix of a language model, and most positions of a batch (prompts, images, padding) predict
nothing that is learned. TRL's fused head skips them on a GPU; given no others, it scores no others anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flamingo_ft.data.encode import IGNORED


def at_label_positions(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` with ``labels`` (B, T) given as TRL's pre-shifted ``shift_labels`` (1, N), of the N tokens that are
    learned, and beside them ``predicting`` (N, 2): row and column of the position that predicts each."""
    labels = inputs["labels"]
    following = labels[:, 1:]
    predicting = torch.nonzero(following != IGNORED)
    learned = following[predicting[:, 0], predicting[:, 1]]
    others = {name: value for name, value in inputs.items() if name != "labels"}
    return others | {"shift_labels": learned[None], "predicting": predicting}
