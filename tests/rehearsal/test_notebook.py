"""The notebook about OpenFlamingo runs, with fewer steps, against the look-alikes of the released models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flamingo_ft.adapters.released_models import TOWER
from tests import hub_folders
from tests.hub_server import Hub
from tests.notebooks.execution import NOTEBOOKS, check_figures, executed, make_kernel

from .hub_contents import INCITE, OPEN_FLAMINGO_4B

pytestmark = pytest.mark.slow
SHORT = {  # the loss is still logged twice, and there is still a checkpoint in the middle
    '"train.max_steps": 100,': '"train.max_steps": 20,',
    '"train.warmup_steps": 10,': '"train.warmup_steps": 2,',
    '"train.save_steps": 50,': '"train.save_steps": 10,',
    '"eval.max_samples": 40,': '"eval.max_samples": 8,',
}
# Run by every Python that starts: OpenCLIP takes ViT-L-14 for something small.
SITE = f"""\
import json
from open_clip.factory import _MODEL_CONFIGS
_MODEL_CONFIGS[{TOWER[0]!r}] = json.loads('''{json.dumps(hub_folders.TOWER)}''')
"""


@pytest.fixture
def kernel(served: Hub, tmp_path: Path, monkeypatch) -> Path:
    """A kernel whose client uses the local Hub, with empty caches. Returns the file of failed commands."""
    failed = make_kernel(tmp_path, monkeypatch)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("SMOKE", raising=False)
    served.requests.clear()
    return failed


def test_the_notebook_about_open_flamingo_runs_as_it_is_but_for_fewer_steps(kernel, served, tmp_path):
    notebook = NOTEBOOKS / "open_flamingo.ipynb"
    check_figures(executed(notebook, tmp_path / "here", timeout=900, changes=SHORT))
    assert kernel.read_text() == "", "a command failed"
    (run,) = (tmp_path / "here").glob("runs/open_flamingo/mine")
    assert json.loads((run / "metrics.json").read_text())["train"]["steps"] == 20
    downloaded = {name for name in (INCITE, OPEN_FLAMINGO_4B) for one in served.requests if name in str(one)}
    assert downloaded == {INCITE, OPEN_FLAMINGO_4B}
