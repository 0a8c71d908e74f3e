"""A web page to try a model: images, streamed answers, where it looks, with and without the adapter.

`demo` starts it; the other modules need the packages of the extra ``demo``.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flamingo_ft.adapters.switched_off import base_bridge
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import is_whole_model
from flamingo_ft.inference.predictor import Predictor

INSTALL = 'pip install "flamingo_ft[demo]"'
EXAMPLES = 6
PREDICTIONS_FILE = "predictions.jsonl"  # of a run, beside its adapter


def demo(
    model: str,
    host: str,
    port: int,
    *,
    share: bool = False,
    quantization: str | None = None,
    **options: Any,
) -> None:
    """Load an adapter or a merged model and show its page until interrupted.

    share: let Gradio make a public link; without it, the page is on ``host`` alone. quantization, options:
    see `Predictor.from_pretrained`. Raises UserError if Gradio is not installed or the port is in use.
    """
    if find_spec("gradio") is None:
        raise UserError(f"demo: Gradio is not installed; run: {INSTALL}")
    folder = fetch_model(model)
    predictor = Predictor.from_pretrained(folder, quantization=quantization, **options)
    bridge = None if is_whole_model(folder) else base_bridge(folder, predictor.model)

    from .page import build_page  # needs the package of the extra

    page = build_page(predictor, model, examples_of(folder), bridge)
    try:
        page.launch(server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"demo: cannot listen on {host}:{port} ({error}); give another --port") from None
    print(f"the page is at {page.share_url or page.local_url}", flush=True)
    page.block_thread()


def examples_of(folder: Path) -> list[dict[str, Any]]:
    """Return questions from a run's own held-out data, of different tasks first: ``text`` and ``files``."""
    file = folder / PREDICTIONS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if all(Path(image).is_file() for image in row["images"])]
    first = sorted({row["task"]: number for number, row in reversed(list(enumerate(rows)))}.values())
    chosen = [*first, *(number for number in range(len(rows)) if number not in first)]
    return [
        {"text": rows[number]["question"], "files": rows[number]["images"]} for number in chosen[:EXAMPLES]
    ]
