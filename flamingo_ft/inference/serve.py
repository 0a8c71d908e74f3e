"""A model behind an OpenAI-style HTTP API: transformers' own server, which is told what a Flamingo is."""

from __future__ import annotations

import socket

from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from flamingo_ft.adapters.files import read_flamingo_config
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration

INSTALL = 'pip install "flamingo_ft[serve]"'


def serve(model: str, host: str, port: int) -> None:
    """Load an adapter or a merged model (a folder, or a name on the Hub), and answer requests until interrupted.

    Raises UserError without the server's packages, for what is no such model, and for a port in use.
    """
    if not is_serve_available():
        raise UserError(f"serve: the server's packages are not installed; run: {INSTALL}")
    folder = fetch_model(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"{model}: no adapter and no merged model; give the folder that a run or a merge wrote")
    read_flamingo_config(folder)
    _check_free(host, port)
    _introduce()

    from transformers.cli.serve import Serve  # it needs the packages that were looked for above

    Serve(force_model=model, host=host, port=port)


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        problem = f"serve: {host}:{port} cannot be listened on ({error.strerror})"
        raise UserError(f"{problem}; give another --port") from None


def _introduce() -> None:
    """The server finds class and kind of a model in transformers' table of names, which registering leaves alone."""
    AutoModelForMultimodalLM.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)
    names = {FlamingoConfig.model_type: FlamingoForConditionalGeneration.__name__}
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.update(names)
