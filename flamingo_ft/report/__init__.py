"""report.html and figures/: a run as it can be seen, from the files that it leaves."""

from .curves import loss_curve
from .live import LiveReport, leaving_a_report
from .page import write_report
from .samples import answer_grid, sample_grid

__all__ = ["LiveReport", "answer_grid", "leaving_a_report", "loss_curve", "sample_grid", "write_report"]
