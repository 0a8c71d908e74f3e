"""What a conversion found and did, told in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flamingo_ft.formats import Checkpoint


@dataclass
class Conversion:
    """source: the format that was recognised; result: what was written at ``out``; lines: what there is to know."""

    source: str
    result: str
    out: Path
    lines: list[str] = field(default_factory=list)


def about(checkpoint: Checkpoint) -> list[str]:
    """What a foreign checkpoint holds."""
    parts = {
        "perceiver": {n: t for n, t in checkpoint.bridge.items() if n.startswith("perceiver.")},
        "cross-attention": {n: t for n, t in checkpoint.bridge.items() if not n.startswith("perceiver.")},
        "language model": checkpoint.language,
        "vision tower": checkpoint.vision,
        "LoRA": checkpoint.lora,
    }
    found = [f"{name}: {_tensors(tensors)}" for name, tensors in parts.items() if tensors]
    reasons = Counter(checkpoint.left_out.values())
    return found + [f"left out: {count} that {reason}" for reason, count in reasons.items()]


def _tensors(tensors: Mapping[str, Tensor]) -> str:
    formats = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {numbers:,} numbers in {' and '.join(formats)}"
