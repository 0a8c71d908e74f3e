"""The notebook about OpenFlamingo runs as it is, against the look-alikes of the released models."""

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


def test_the_notebook_about_open_flamingo_runs_as_it_is(kernel, served, tmp_path):
    check_figures(executed(NOTEBOOKS / "open_flamingo.ipynb", tmp_path / "here", timeout=900))
    assert kernel.read_text() == "", "a command failed"
    (run,) = (tmp_path / "here").glob("runs/open_flamingo/mine")
    assert json.loads((run / "metrics.json").read_text())["train"]["steps"] == 100
    downloaded = {name for name in (INCITE, OPEN_FLAMINGO_4B) for one in served.requests if name in str(one)}
    assert downloaded == {INCITE, OPEN_FLAMINGO_4B}
