"""Notebooks are thin, equal to their sources, and run whole: offline, in any directory, under SMOKE=1."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

import flamingo_ft

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
FIGURE = "figure"  # tag of a cell that shows one
MIN_DEVIATION = 5.0  # of the 8-bit values of a figure that shows something
MIN_INK = 0.005  # fraction of its pixels that are not background
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def make():
    """The script that writes the notebooks, as a module."""
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_of(notebook: nbformat.NotebookNode) -> str:
    """All its code cells as plain Python, magics included."""
    transform = TransformerManager().transform_cell
    return "\n".join(transform(cell.source) for cell in code_cells(notebook))


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


# --- as they are stored ---


def test_every_source_is_a_notebook_in_the_table(make):
    assert (
        {path.stem for path in NOTEBOOKS}
        == {path.stem for path in make.SOURCES.glob("*.py")}
        == {*make.ORDER}
    )


def test_notebooks_and_their_table_are_what_the_script_writes(make):
    for path, text in make.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python notebooks/make.py"


@every_notebook
def test_a_notebook_is_valid_and_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert outputs(notebook) == []
    assert all(cell.execution_count is None for cell in code_cells(notebook))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@every_notebook
def test_a_notebook_begins_with_title_badge_needs_and_the_install_cell(path, make):
    notebook = nbformat.read(path, as_version=4)
    title, badge, needs = notebook.cells[0].source.split("\n\n")
    assert title.startswith("# ") and badge == make.badge(path.stem)
    assert make.REPOSITORY in badge and badge.endswith(f"/notebooks/{path.name})")
    assert "Colab: not tried" in needs and "measured" in needs.lower()
    install = code_cells(notebook)[0].source
    assert install == notebook.cells[1].source == make.INSTALL
    assert "%pip install" in install and f"github.com/{make.REPOSITORY}@" in install
    assert "%pip" not in "".join(cell.source for cell in code_cells(notebook)[1:])


@every_notebook
def test_a_notebook_defines_nothing(path):
    tree = ast.parse(code_of(nbformat.read(path, as_version=4)))
    assert not [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]


@every_notebook
def test_links_of_a_notebook_lead_to_files(path, make):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    links = [part.partition(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    local = [FOLDER / link for link in links if "://" not in link]
    local += [
        FOLDER.parent / link.removeprefix(make.FILES)[1:] for link in links if link.startswith(make.FILES)
    ]
    assert not [link for link in local if not link.exists()]


def test_a_source_with_a_wrong_header_is_refused(make):
    with pytest.raises(ValueError, match="header of a cell"):
        [*make.cells("# %% [code] x\n1\n")]


def test_magics_and_shell_commands_are_comments_in_a_source(make):
    source = '# %%\n# %matplotlib inline\nif a:\n    # !ls {a}\n# plain\n# %% tags=["figure"]\nb'
    assert [*make.cells(source)] == [
        (False, [], "%matplotlib inline\nif a:\n    !ls {a}\n# plain"),
        (False, ["figure"], "b"),
    ]


# --- as they run ---


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A Jupyter home with one kernel: this Python, this package, offline. Returns where failures go."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec | {"display_name": "Python 3", "language": "python"}))
    for home in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(home, str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(Path(flamingo_ft.__file__).parents[1]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # models so small gain nothing from a second thread
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return write_command(tmp_path, monkeypatch)


def write_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a `flamingo-ft` on the path, which notes failures in the file that is returned."""
    failed, command = folder / "failed.txt", folder / "bin" / "flamingo-ft"
    failed.touch()
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n"{sys.executable}" -m flamingo_ft "$@" || echo "$@" >> "{failed}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return failed


def images(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    """The pictures that a cell showed, in grey."""
    shown = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) for data in shown]


def is_blank(picture: np.ndarray) -> bool:
    background = np.bincount(picture.ravel()).argmax()
    return picture.std() < MIN_DEVIATION or (picture != background).mean() < MIN_INK


def test_a_picture_of_one_colour_is_blank_and_one_with_a_curve_is_not():
    picture = np.full((200, 300), 255, np.uint8)
    assert is_blank(picture)
    picture[np.arange(200), np.arange(200)] = picture[np.arange(200), np.arange(200) + 3] = 0
    assert not is_blank(picture)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_whole_and_its_figures_show_something(path, kernel, tmp_path):
    notebook, here = nbformat.read(path, as_version=4), tmp_path / "here"
    here.mkdir()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(here)}}).execute()
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert kernel.read_text() == "", "a command failed"
    figures = [cell for cell in code_cells(notebook) if FIGURE in cell.metadata.get("tags", ())]
    assert len(figures) >= 2
    for cell in figures:
        pictures = images(cell)
        assert pictures and not any(map(is_blank, pictures)), cell.source
    untagged = [cell for cell in code_cells(notebook) if cell not in figures and images(cell)]
    assert not untagged, f"these cells show a figure and need the tag: {[cell.source for cell in untagged]}"
    assert list(here.iterdir()) == []
