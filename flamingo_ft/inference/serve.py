"""A model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from transformers.utils.import_utils import is_serve_available

from flamingo_ft.adapters import load_trained
from flamingo_ft.adapters.files import read_flamingo_config
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model

INSTALL = 'pip install "flamingo_ft[serve]"'
MAX_BODY_MIB = 64
SHUTDOWN_SECONDS = 10  # that answers on their way have after Ctrl-C


def serve(
    model: str,
    host: str,
    port: int,
    *,
    allowed_media: Path | None = None,
    image_urls: Literal["public", "any", "none"] = "public",
    max_body_mib: int = MAX_BODY_MIB,
) -> None:
    """Load an adapter or a merged model (a folder, or a name on the Hub), and answer requests until interrupted.

    allowed_media: folder whose image files requests may name. image_urls: see `MediaPolicy`. max_body_mib: size of a
    request's body. Raises UserError without the server's packages, for what is no such model, and for a port in use.
    """
    if not is_serve_available():
        raise UserError(f"serve: the server's packages are not installed; run: {INSTALL}")
    folder = fetch_model(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{model}: no adapter and no merged model; give the folder that a run or a merge wrote"
        )
    read_flamingo_config(folder)
    _check_free(host, port)

    import uvicorn  # these need the packages that were looked for above

    from flamingo_ft.inference.server.app import build_app
    from flamingo_ft.inference.server.engine import Engine
    from flamingo_ft.inference.server.images import MediaPolicy

    engine = Engine(*load_trained(folder), MediaPolicy(allowed_media, image_urls))
    app = build_app(engine, model, max_body_mib << 20)
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=SHUTDOWN_SECONDS)


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        problem = f"serve: {host}:{port} cannot be listened on ({error.strerror})"
        raise UserError(f"{problem}; give another --port") from None
