"""Plain TRL scripts that use nothing of this package but model loading run and learn."""

import json
import runpy
import statistics
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """Return a function that runs a script and parses its last line."""

    def run(name: str) -> list[float]:
        monkeypatch.setattr(sys, "argv", [name, str(QUICKSTART), str(tmp_path)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow
def test_the_loss_of_a_plain_sft_script_falls(printed):
    losses = printed("sft_script.py")
    assert len(losses) == 24 and statistics.mean(losses[-4:]) < 0.6 * statistics.mean(losses[:4])


@pytest.mark.slow
def test_the_margins_of_a_plain_dpo_script_rise(printed):
    margins = printed("dpo_script.py")
    assert len(margins) == 12 and margins[0] == 0 and statistics.mean(margins[-3:]) > 1
