"""report.html and figures/: a run as pages and pictures, drawn from the files it leaves."""

from .curves import loss_curve
from .page import LiveReport, final_report, write_report
from .sample_grid import answer_grid, sample_grid

__all__ = ["LiveReport", "answer_grid", "final_report", "loss_curve", "sample_grid", "write_report"]
