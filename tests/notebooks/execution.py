"""Run a notebook as a user does: in an empty folder, with this Python and `flamingo-ft` on the path."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import flamingo_ft

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FIGURE = "figure"  # tag of a cell that shows one
MIN_DEVIATION = 5.0  # of the 8-bit values of a figure that shows something
MIN_INK = 0.005  # fraction of its pixels that are not background


def make_kernel(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make a Jupyter home with one kernel: this Python, this package.

    Returns the file in which commands that fail are noted.
    """
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec | {"display_name": "Python 3", "language": "python"}))
    for home in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        patch.setenv(home, str(folder / "jupyter"))
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    patch.setenv("PYTHONPATH", str(Path(flamingo_ft.__file__).parents[1]))
    patch.setenv("OMP_NUM_THREADS", "1")  # models so small gain nothing from a second thread
    (folder / "temporary").mkdir()
    patch.setenv("TMPDIR", str(folder / "temporary"))
    return _write_command(folder, patch)


def _write_command(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Put a `flamingo-ft` on the path, which notes failures in the file that is returned."""
    failed, command = folder / "failed.txt", folder / "bin" / "flamingo-ft"
    failed.touch()
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n"{sys.executable}" -m flamingo_ft "$@" || echo "$@" >> "{failed}"\n')
    command.chmod(0o755)
    patch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return failed


def executed(path: Path, here: Path, timeout: int = 300) -> nbformat.NotebookNode:
    """Return a notebook with its outputs, after running it in the new folder ``here`` without an error.

    timeout: seconds for a cell.
    """
    notebook = nbformat.read(path, as_version=4)
    here.mkdir()
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(here)}}).execute()
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    return notebook


def check_figures(notebook: nbformat.NotebookNode) -> None:
    """Check that the cells with the tag of a figure, and no others, show one that is not blank."""
    figures = [cell for cell in code_cells(notebook) if FIGURE in cell.metadata.get("tags", ())]
    assert len(figures) >= 2
    for cell in figures:
        pictures = images(cell)
        assert pictures and not any(map(is_blank, pictures)), cell.source
    untagged = [cell for cell in code_cells(notebook) if cell not in figures and images(cell)]
    assert not untagged, f"these cells show a figure and need the tag: {[cell.source for cell in untagged]}"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def images(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    """The pictures that a cell showed, in grey."""
    shown = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L")) for data in shown]


def is_blank(picture: np.ndarray) -> bool:
    background = np.bincount(picture.ravel()).argmax()
    return picture.std() < MIN_DEVIATION or (picture != background).mean() < MIN_INK
