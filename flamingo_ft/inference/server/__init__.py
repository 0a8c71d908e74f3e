"""An OpenAI-compatible HTTP API around one model: chat completions, completions and responses.

`serve` starts it; the other modules need the packages of the extra ``serve``.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Literal

from transformers.utils import is_serve_available

from flamingo_ft.adapters.files import read_flamingo_config
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.inference.predictor import Predictor

INSTALL = 'pip install "flamingo_ft[serve]"'
MAX_BODY_MIB = 64
SHUTDOWN_SECONDS = 10  # for answers in progress, after Ctrl-C


def serve(
    model: str,
    host: str,
    port: int,
    *,
    allowed_media: Path | None = None,
    image_urls: Literal["public", "any", "none"] = "public",
    max_body_mib: int = MAX_BODY_MIB,
    **options: Any,
) -> None:
    """Load an adapter or a merged model, from a folder or the Hub, and answer requests until interrupted.

    allowed_media: folder whose image files requests may name. image_urls: see `MediaPolicy`. max_body_mib:
    largest body of a request. options: see `Predictor.from_pretrained`. Raises UserError if the server's
    packages are not installed, the folder holds no model, or the port is in use.
    """
    if not is_serve_available():
        raise UserError(f"serve: the server's packages are not installed; run: {INSTALL}")
    folder = fetch_model(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{model}: not an adapter or a merged model; give the folder that a run or a merge wrote"
        )
    read_flamingo_config(folder)
    _check_port(host, port)

    import uvicorn  # this and the modules below need the packages of the extra

    from .app import build_app
    from .engine import Engine
    from .messages import MediaPolicy

    engine = Engine(Predictor.from_pretrained(folder, **options), MediaPolicy(allowed_media, image_urls))
    app = build_app(engine, model, max_body_mib << 20)
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=SHUTDOWN_SECONDS)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        problem = f"serve: cannot listen on {host}:{port} ({error.strerror})"
        raise UserError(f"{problem}; give another --port") from None
