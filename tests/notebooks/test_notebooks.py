"""Notebooks are thin, equal to their sources, and run whole: offline, in any directory, under SMOKE=1."""

from __future__ import annotations

import ast
import importlib.util

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from .execution import NOTEBOOKS as FOLDER
from .execution import check_figures, code_cells, executed, is_blank, make_kernel, outputs

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def make():
    """The script that writes the notebooks, as a module."""
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(notebook: nbformat.NotebookNode) -> str:
    """All its code cells as plain Python, magics included."""
    transform = TransformerManager().transform_cell
    return "\n".join(transform(cell.source) for cell in code_cells(notebook))


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
    """A kernel without a network. Returns the file of failed commands."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SMOKE", "1")
    return make_kernel(tmp_path, monkeypatch)


def test_a_picture_of_one_colour_is_blank_and_one_with_a_curve_is_not():
    picture = np.full((200, 300), 255, np.uint8)
    assert is_blank(picture)
    picture[np.arange(200), np.arange(200)] = picture[np.arange(200), np.arange(200) + 3] = 0
    assert not is_blank(picture)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_whole_and_its_figures_show_something(path, kernel, tmp_path):
    here = tmp_path / "here"
    check_figures(executed(path, here))
    assert kernel.read_text() == "", "a command failed"
    assert list(here.iterdir()) == []
