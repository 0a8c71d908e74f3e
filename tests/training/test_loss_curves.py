"""Ten steps of each kind of training through the command line give the recorded losses."""

import json

import pytest

from tests.golden.record_loss_curves import CASES, FILE, losses_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "bridge")) for c in CASES])
def test_ten_steps_give_the_recorded_losses(tmp_path, case):
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[case]
    assert len(recorded) == 10 and len(set(recorded)) > 5
    assert losses_of(case, tmp_path / "run") == pytest.approx(recorded, rel=1e-5)
