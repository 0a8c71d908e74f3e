"""Serve the page: its address, its style, and a folder of its own for its files."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from flamingo_ft.errors import UserError

FOLDER_VARIABLE = "GRADIO_TEMP_DIR"
# Images of any size are shown equally high; many tokens scroll.
CSS = """
.chat img { height: 8rem; width: auto; object-fit: contain; }
#token { max-height: 11rem; overflow-y: auto; }
"""


@contextmanager
def private_folder() -> Generator[Path]:
    """Keep uploads and pictures of the pages built inside the block in a folder that is removed afterwards.

    By default all Gradio pages of a machine share one folder, and files of visitors stay there.
    """
    previous = os.environ.get(FOLDER_VARIABLE)
    with TemporaryDirectory(prefix="flamingo_ft-demo-", dir=previous) as folder:
        os.environ[FOLDER_VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            if previous is None:
                del os.environ[FOLDER_VARIABLE]
            else:
                os.environ[FOLDER_VARIABLE] = previous


def serve_page(page: gr.Blocks, host: str, port: int | None = None, share: bool = False) -> None:
    """Serve a page in a thread. port: None for any free one. Raises UserError if the port is in use."""
    try:
        page.launch(
            server_name=host, server_port=port, share=share, css=CSS, quiet=True, prevent_thread_lock=True
        )
    except OSError as error:
        raise UserError(f"demo: cannot listen on {host}:{port} ({error}); give another --port") from None
