"""Pictures of samples and of a run."""

from .curves import loss_curve
from .samples import answer_grid, sample_grid

__all__ = ["answer_grid", "loss_curve", "sample_grid"]
