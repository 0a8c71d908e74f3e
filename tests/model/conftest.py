"""Reports the law of zero gates over language model families in the terminal summary."""

from __future__ import annotations

import pytest

from .tiny_language_models import KNOWN, LEFT_OUT, NEWER

PASSED = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter, config):
    """How many families of causal language models carry the bridge, and which were left out and why."""
    passed = config.stash.get(PASSED, [])
    if not passed:
        return
    total = len(KNOWN) + len(NEWER)
    terminalreporter.section("language model families")
    terminalreporter.line(f"zero gates leave the logits unchanged: {len(passed)} of {total} families")
    for family, reason in {**LEFT_OUT, **dict.fromkeys(NEWER, "newer than transformers 5.23")}.items():
        terminalreporter.line(f"left out: {family}: {reason}")
