"""Notebooks are thin and clean, and run whole: offline, in any directory, with the Python that runs this."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import flamingo_ft

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook: nbformat.NotebookNode) -> str:
    """All its code cells as plain Python, magics included."""
    transform = TransformerManager().transform_cell
    return "\n".join(transform(cell.source) for cell in notebook.cells if cell.cell_type == "code")


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def words(notebook: nbformat.NotebookNode) -> str:
    """All that its cells printed or showed as text."""
    texts = (output.get("text") or output.get("data", {}).get("text/plain") for output in outputs(notebook))
    return "\n".join(filter(None, texts))


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_a_notebook_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


@every_notebook
def test_a_notebook_is_kept_without_outputs_and_traces_of_a_machine(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert outputs(notebook) == []
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)


@every_notebook
def test_a_notebook_defines_nothing(path):
    tree = ast.parse(code_of(nbformat.read(path, as_version=4)))
    assert not [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A Jupyter home with one kernel: this Python, this package, offline."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec | {"display_name": "Python 3", "language": "python"}))
    for home in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(home, str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(Path(flamingo_ft.__file__).parents[1]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_whole_and_shows_pictures_and_an_accuracy_above_nine_tenths(path, kernel, tmp_path):
    notebook, here = nbformat.read(path, as_version=4), tmp_path / "here"
    here.mkdir()
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(here)}}).execute()
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    (row,) = re.findall(r"^\W*all\b.*$", words(notebook), flags=re.MULTILINE)
    majority, before, after, with_another_image = (float(found) for found in re.findall(r"([\d.]+) %", row))
    assert after >= 90 and max(majority, before, with_another_image) <= 50
    assert list(here.iterdir()) == []
