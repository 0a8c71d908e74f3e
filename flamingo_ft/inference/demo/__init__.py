"""A web page to try a model: images, streamed answers, where it looks, with and without the adapter.

`demo` starts it; the modules that it imports late need the packages of the extra ``demo``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flamingo_ft.adapters.switched_off import base_bridge
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.weight_files import is_whole_model
from flamingo_ft.inference.predictor import Predictor

from .examples import examples_of

INSTALL = 'pip install "flamingo_ft[demo]"'


def demo(
    model: str,
    host: str,
    port: int,
    *,
    share: bool = False,
    start: str | Path | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> None:
    """Load an adapter or a merged model and serve its page until interrupted.

    share: let Gradio make a public link; without it, the page is on ``host`` alone. start,
    quantization, dtype, options: see `Predictor.from_pretrained`. Raises UserError if Gradio is not installed
    or the port is in use.
    """
    if find_spec("gradio") is None:
        raise UserError(f"demo: Gradio is not installed; run: {INSTALL}")
    folder = fetch_model(model)
    predictor = Predictor.from_pretrained(
        folder, start=start, quantization=quantization, dtype=dtype, **options
    )
    bridge = None if is_whole_model(folder) else base_bridge(folder, predictor.model, start)

    from .page import build_page  # these need the packages of the extra
    from .serving import private_folder, serve_page
    from .switchable_model import SwitchableModel

    with private_folder() as files:
        page = build_page(SwitchableModel(predictor, bridge), model, examples_of(folder, files))
        serve_page(page, host, port, share)
        print(f"the page is at {page.share_url or page.local_url}", flush=True)
        page.block_thread()
