"""report.html and figures/: a run as it can be seen, from the files that it leaves."""

from .live import LiveReport, leaving_a_report
from .page import write_report

__all__ = ["LiveReport", "leaving_a_report", "write_report"]
