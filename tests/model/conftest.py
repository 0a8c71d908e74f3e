"""Report in the terminal summary on how many language model families the bridge was tested."""

from __future__ import annotations

from .tiny_language_models import KNOWN, LEFT_OUT, NEWER

LAW = "test_zero_gates_leave_the_language_model_unchanged["


def pytest_terminal_summary(terminalreporter):
    """Report how many families passed the test of zero gates, and which were left out and why."""
    passed = sum(
        LAW in report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"
    )
    if not passed:
        return
    total = len(KNOWN) + len(NEWER)
    terminalreporter.section("language model families")
    terminalreporter.line(f"zero gates leave the logits unchanged: {passed} of {total} families")
    for family, reason in {**LEFT_OUT, **dict.fromkeys(NEWER, "newer than transformers 5.23")}.items():
        terminalreporter.line(f"left out: {family}: {reason}")
