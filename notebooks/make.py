"""Write the notebooks and their table from `sources/`: `python notebooks/make.py`.

A source is Python in percent format: a line ``# %%`` begins a code cell, ``# %% [markdown]`` a cell of text
in comments, and ``# %% tags=["figure"]`` a code cell with a tag. Magics and shell commands are comments that
begin with ``# %`` or ``# !``, so that a source is valid Python. The first cell is the title and, below it,
what the notebook needs and whether that was measured; badge and install cell are added here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPOSITORY = "flamingo-ft/flamingo_ft"  # on GitHub; badges and install cells follow from it
BRANCH = "main"
FILES = f"https://github.com/{REPOSITORY}/blob/{BRANCH}"
FOLDER = Path(__file__).parent
SOURCES = FOLDER / "sources"
ORDER = (
    "quickstart",
    "open_flamingo",
    "new_model",
    "evaluate_and_share",
    "inside",
    "preferences",
    "documents",
)
ON_GPU = ("open_flamingo", "new_model")
HEADER = re.compile(r"# %%( \[markdown\])?(?: tags=(\[.*\]))?")
MAGIC = re.compile(r"^(\s*)# ([!%])", flags=re.MULTILINE)
INSTALL = f"""\
import os
from importlib.util import find_spec

if find_spec("flamingo_ft") is None and os.environ.get("SMOKE") != "1":
    %pip install -q "flamingo_ft[notebook] @ git+https://github.com/{REPOSITORY}@{BRANCH}\""""
TABLE_HEAD = """\
# Notebooks

Open one in Colab with its badge. On your own machine, `pip install -e '.[notebook]'` installs what they need;
open them in VS Code or JupyterLab (`pip install jupyterlab`, then `jupyter lab notebooks`), or run one whole:

```bash
SMOKE=1 jupyter execute --output=quickstart_tried notebooks/quickstart.ipynb
```

`--output=NAME` writes the notebook with its outputs beside it, `--inplace` into the same file; without either
they are not kept. `SMOKE=1` only tries a notebook, offline on a CPU in about a minute: every run trains for 6
steps, is asked 4 held-out samples of each source, and is kept in a temporary folder, and small stand-ins
replace what would be downloaded. Such models have learned nothing, and their tables and figures do not show
what the text describes; leave `SMOKE=1` out for that. `python notebooks/make.py` writes the notebooks from
`sources/`.

| notebook | what it needs | |
|---|---|---|
"""


def badge(name: str) -> str:
    """Return the link that opens a notebook in Colab, as Markdown."""
    url = f"https://colab.research.google.com/github/{REPOSITORY}/blob/{BRANCH}/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def cells(source: str) -> Iterator[tuple[bool, list[str], str]]:
    """Yield for each cell whether it is text, its tags, and its content.

    Raises ValueError for a wrong header.
    """
    _, *parts = re.split(r"^(?=# %%)", source, flags=re.MULTILINE)
    for part in parts:
        first, _, content = part.partition("\n")
        header = HEADER.fullmatch(first)
        if header is None:
            raise ValueError(f"expected the header of a cell, got {first!r}")
        is_text, tags = header[1] is not None, json.loads(header[2] or "[]")
        yield is_text, tags, (text(content) if is_text else MAGIC.sub(r"\1\2", content)).strip()


def text(comments: str) -> str:
    """Return the Markdown in comments; links to other folders lead to GitHub, as Colab has no other files."""
    plain = re.sub(r"^# ?", "", comments, flags=re.MULTILINE)
    return plain.replace("](../", f"]({FILES}/")


def head(name: str) -> tuple[str, str]:
    """Return the title of a notebook and what it needs."""
    _, _, content = next(cells((SOURCES / f"{name}.py").read_text(encoding="utf-8")))
    title, needs = content.split("\n\n", maxsplit=1)
    return title.removeprefix("# "), " ".join(needs.split())


def notebook(name: str) -> Any:
    """Return a notebook without outputs."""
    title, needs = head(name)
    _, *body = cells((SOURCES / f"{name}.py").read_text(encoding="utf-8"))
    made = [new_markdown_cell(f"# {title}\n\n{badge(name)}\n\n{needs}"), new_code_cell(INSTALL)]
    for is_text, tags, content in body:
        metadata = {"tags": tags} if tags else {}
        made.append((new_markdown_cell if is_text else new_code_cell)(content, metadata=metadata))
    for number, cell in enumerate(made):
        cell["id"] = f"{name.replace('_', '-')}-{number}"
    metadata: dict[str, Any] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if name in ON_GPU:
        metadata |= {"accelerator": "GPU", "colab": {"gpuType": "T4"}}
    return new_notebook(cells=made, metadata=metadata)


def files() -> dict[Path, str]:
    """Return what this script writes: the text of each file."""
    texts = {FOLDER / f"{name}.ipynb": nbformat.writes(notebook(name)) + "\n" for name in ORDER}
    rows = [
        f"| [{title}]({name}.ipynb) | {needs} | {badge(name)} |"
        for name in ORDER
        for title, needs in [head(name)]
    ]
    return texts | {FOLDER / "README.md": TABLE_HEAD + "\n".join(rows) + "\n"}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
